"""A calibration pass: real text through a trained backbone, and from it how much every part matters.

Scores of channels and heads, by variant (a: what a part puts out; W: the weights that read it; g: the loss's gradient):

| variant | score of a part | after |
| --- | --- | --- |
| magnitude | mean abs(a) | Minitron, arXiv 2407.14679, section 2.2 |
| energy | mean a^2 | MobileLLM-Flash's "activation energy", arXiv 2603.15954 (its formula is not published) |
| wanda | mean a^2 x sum W^2 | Wanda, arXiv 2306.11695, equation 1, squared and summed over the part's weights |
| taylor | mean over rows of abs(sum a g) | Molchanov et al. 2019, arXiv 1906.10771 |
| weights | sum W^2 | no data: the plain baseline |
| random | uniform noise | the floor of an ablation |

Blocks, and their attention alone, by `layers`: `cosine` is 1 - cos(stream before, stream after), `loss` is the rise of the
loss when the part is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from data_pipeline.loader import Batch
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.importance import Importance, norm_names
from stages.activations import Activations
from stages.distributed import Process, all_reduce_sum
from stages.objectives import IGNORE, head_rows, linear_cross_entropy

Variant = Literal["magnitude", "energy", "wanda", "taylor", "weights", "random"]
LayerScore = Literal["cosine", "loss"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
LAYER_SCORES: tuple[LayerScore, ...] = get_args(LayerScore)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Every score of one calibration pass; `importance` picks one variant for pruning."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    """fp32: `{ffn,hidden,heads}.VARIANT`, `{blocks,attention}.LAYER_SCORE`, `norm_energy.NAME`."""
    loss: float
    """Of the whole backbone on the calibration text, nats a token."""
    tokens: int

    def importance(self, variant: Variant = "wanda", layers: LayerScore = "cosine") -> Importance:
        """Raises ValueError for a variant that this pass did not compute."""
        for name, key, known in (("variant", f"ffn.{variant}", VARIANTS), ("layer score", f"blocks.{layers}", LAYER_SCORES)):
            if key not in self.tensors:
                have = [item for item in known if f"{key.partition('.')[0]}.{item}" in self.tensors]
                raise ValueError(f"no {name} {key.partition('.')[2]!r} in this calibration; it has {', '.join(have)}")
        return Importance(
            **{part: self.tensors[f"{part}.{variant}"] for part in ("ffn", "hidden", "heads")},
            **{part: self.tensors[f"{part}.{layers}"] for part in ("blocks", "attention")},
            norm_energy={name: self.tensors[f"norm_energy.{name}"] for name in norm_names(self.config)},
        )


def calibrate(
    model: Decoder, batches: Iterable[Batch], process: Process | None = None, *, drop_batches: int = 2, seed: int = 0
) -> Scores:
    """Run `batches` (this rank's) through `model` and score every part; all ranks return the same scores.

    Args:
        model: whole, on this rank's device; its weights are not changed.
        batches: read once, one at a time; every rank needs as many.
        drop_batches: how many of the first batches measure the loss with each block, and each attention, left out: one forward
            pass a block and batch. 0 leaves `loss` layer scores out.
        seed: of the `random` variant.

    Raises ValueError for a mixture of experts, where no token counts, or where the backbone's own loss is not finite.
    """
    if model.config.moe is not None:
        raise ValueError("the model has experts; importance is measured, and cut by, in dense models only")
    process = Process() if process is None else process
    device = model.embed.weight.device
    watched, total = Activations(model), torch.zeros((), dtype=torch.float64, device=device)
    kept: list[Batch] = []
    model.requires_grad_(False)
    handle = model.embed.register_forward_hook(lambda _, __, output: output.detach().requires_grad_(True))
    try:
        with watched.watching():
            for batch in batches:
                kept += [batch] if len(kept) < drop_batches else []
                labels = batch.labels.to(device)
                with watched.batch(labels != IGNORE):
                    loss = _summed_loss(model, batch)
                    loss.backward()
                total += loss.detach().double()
    finally:
        handle.remove()
    _over_ranks(watched, total, process)
    if watched.tokens == 0:
        raise ValueError("the calibration text holds no token to predict; expected at least one")
    mean = float(total) / watched.tokens
    if not abs(mean) < float("inf"):
        raise ValueError(f"the backbone's loss on the calibration text is {mean}; expected a finite number: is it trained?")
    tensors = {**_part_scores(model, watched, seed), **_turns(model, watched)}
    if drop_batches:
        tensors |= _drop_scores(model, kept, process)
    return Scores(config=model.config, tensors={name: t.float().cpu() for name, t in tensors.items()}, loss=mean,
                  tokens=watched.tokens)  # fmt: skip


def _summed_loss(model: Decoder, batch: Batch) -> Tensor:
    device = model.embed.weight.device
    hidden, weight = model.head_operands(model.hidden(batch.tokens.to(device), batch.positions.to(device)))
    return linear_cross_entropy(hidden, weight, head_rows(model.config, batch.labels.to(device)))


def _over_ranks(watched: Activations, total: Tensor, process: Process) -> None:
    """Sums of this rank become sums of all."""
    all_reduce_sum(total, process)
    count = torch.tensor(float(watched.tokens), dtype=torch.float64, device=total.device)
    watched.tokens = int(all_reduce_sum(count, process))
    for name in sorted(watched.sums):
        watched.sums[name] = all_reduce_sum(watched.sums[name].to(total.device).contiguous(), process)


def _part_scores(model: Decoder, watched: Activations, seed: int) -> dict[str, Tensor]:
    """`{ffn,hidden,heads}.VARIANT` and `norm_energy.NAME`."""
    config = model.config
    found: dict[str, Tensor] = {}
    for part, raw in (("ffn", _ffn(model, watched)), ("heads", _heads(model, watched)), ("hidden", _hidden(model, watched))):
        found |= {f"{part}.{variant}": tensor for variant, tensor in raw.items()}
        generator = torch.Generator().manual_seed(seed)
        found[f"{part}.random"] = torch.rand(raw["energy"].shape, generator=generator)
    attends = torch.tensor([kind != "skip" for kind in config.attention_kinds])
    found["heads.random"] *= attends[:, None]
    return found | {f"norm_energy.{name}": watched.mean(f"energy.{name}") for name in norm_names(config)}


def _ffn(model: Decoder, watched: Activations) -> dict[str, Tensor]:
    rows = []
    for index, block in enumerate(model.blocks):
        square = watched.mean(f"ffn.{index}.square")
        read = _column_energy(block.get_submodule("feed_forward.down"))
        rows.append({"magnitude": watched.mean(f"ffn.{index}.abs"), "energy": square, "wanda": square * read,
                     "taylor": watched.mean(f"ffn.{index}.taylor"), "weights": read})  # fmt: skip
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _heads(model: Decoder, watched: Activations) -> dict[str, Tensor]:
    """Per query head: sums over its channels."""
    config, rows = model.config, []
    for index, kind in enumerate(config.attention_kinds):
        if kind == "skip":
            rows.append(dict.fromkeys(("magnitude", "energy", "wanda", "taylor", "weights"), torch.zeros(config.num_heads)))
            continue
        square = watched.mean(f"heads.{index}.square")
        read = _column_energy(model.blocks[index].get_submodule("attention.o"))
        channels = {"magnitude": watched.mean(f"heads.{index}.abs"), "energy": square, "wanda": square * read, "weights": read}
        row = {name: value.view(config.num_heads, -1).sum(dim=1) for name, value in channels.items()}
        rows.append(row | {"taylor": watched.mean(f"heads.{index}.taylor")})
    return {name: torch.stack([row[name].double() for row in rows]) for name in rows[0]}


def _hidden(model: Decoder, watched: Activations) -> dict[str, Tensor]:
    """Sums over all norms: a channel of the residual stream is read wherever the stream is normalised."""
    zero = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    found = {name: zero.clone() for name in ("magnitude", "energy", "wanda", "weights")}
    for name in norm_names(model.config):
        square, read = watched.mean(f"normed.{name}.square"), _readers(model, name)
        found["magnitude"] += watched.mean(f"normed.{name}.abs")
        found["energy"] += square
        found["wanda"] += square * read
        found["weights"] += read
    return found | {"taylor": watched.mean("hidden.taylor")}


def _readers(model: Decoder, norm: str) -> Tensor:
    """Energy of the columns of every matrix that reads this norm."""
    block, _, kind = norm.rpartition(".")
    if norm == "norm":
        return _column_energy(model.embed if model.head is None else model.head)
    attention, ffn = ("attention.q", "attention.k", "attention.v"), ("feed_forward.gate", "feed_forward.up")
    names = attention if kind == "attention_norm" else ffn
    return sum((_column_energy(model.get_submodule(f"{block}.{name}")) for name in names), torch.zeros(()))


def _column_energy(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().double().square().sum(dim=0).cpu()


def _turns(model: Decoder, watched: Activations) -> dict[str, Tensor]:
    indices = range(model.config.num_layers)
    return {
        "blocks.cosine": torch.stack([watched.mean(f"block.{index}") for index in indices]),
        "attention.cosine": torch.stack([watched.mean(f"attention.{index}") for index in indices]),
    }


@torch.no_grad()
def _drop_scores(model: Decoder, batches: Sequence[Batch], process: Process) -> dict[str, Tensor]:
    """Rise of the mean loss when a block, or its attention, does nothing."""
    kinds = model.config.attention_kinds
    count = torch.tensor(float(sum(batch.supervised_tokens for batch in batches)), dtype=torch.float64)

    def loss() -> Tensor:
        return torch.stack([_summed_loss(model, batch).double() for batch in batches]).sum().cpu()

    sums = [loss()]
    for index in range(len(kinds)):
        with _replaced(model.blocks, str(index), _Idle(adds=False)):
            sums.append(loss())
        if kinds[index] != "skip":
            with _replaced(model.blocks[index], "attention", _Idle(adds=True)):
                sums.append(loss())
    everything = all_reduce_sum(torch.stack([count, *sums]).to(process.device), process).cpu()
    means = iter((everything[1:] / everything[0].clamp(min=1)).tolist())
    whole, blocks, attention = next(means), [], []
    for kind in kinds:
        blocks.append(next(means) - whole)
        attention.append(0.0 if kind == "skip" else next(means) - whole)
    return {"blocks.loss": torch.tensor(blocks), "attention.loss": torch.tensor(attention)}


class _Idle(nn.Module):
    """Stands in for a block (gives back its input) or for an attention (adds nothing)."""

    def __init__(self, *, adds: bool) -> None:
        super().__init__()
        self.adds = adds

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(x) if self.adds else x


@contextmanager
def _replaced(parent: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    before = parent.get_submodule(name)
    setattr(parent, name, module)
    try:
        yield
    finally:
        setattr(parent, name, before)
