"""Training a supernet: the one loop, with a module whose forward pass runs several architectures on the same rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.loader import BatchLoader
from data_pipeline.prepare import PreparedStage
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.identity import config_key
from modeling.supernet import Supernet, sandwich
from stages.checkpoint import resolve
from stages.checkpoint_files import file_entry, write_durably
from stages.checkpoint_writer import CheckpointWriter
from stages.config import CheckpointConfig, ParallelConfig, StageConfig
from stages.distributed import Process
from stages.errors import CheckpointError
from stages.lineage import Lineage
from stages.objectives import Teacher, TrainableModel, head_rows, linear_cross_entropy, linear_token_nll
from stages.optim import build_optimizer
from stages.parallel.fsdp import compute_context, gradient_clipper
from stages.scoring import TokenScores
from stages.state import code_revision, model_document
from stages.trainer import Cadence, Trainer

WEIGHTS = "supernet.safetensors"


class SupernetModel(TrainableModel):
    """A supernet as the loop sees it: the mean loss over the architectures that `steps` gives for each call."""

    def __init__(self, supernet: Supernet, steps: Iterator[list[ModelConfig]]) -> None:
        nn.Module.__init__(self)
        self.model: Any = supernet
        self.distill = None
        self.steps = steps

    def forward(
        self, tokens: Tensor, positions: Tensor | None, labels: Tensor, teacher: Teacher | None = None,
        reduction: str = "sum",
    ) -> Tensor:  # fmt: skip
        """Summed cross entropy, averaged over the architectures."""
        if reduction != "sum" or teacher is not None:
            raise ValueError("a supernet is trained on summed cross entropy; extract a model to score or to teach it")
        candidates = next(self.steps)
        losses = []
        for candidate in candidates:
            hidden, weight = self.model.hidden(candidate, tokens, positions)
            losses.append(linear_cross_entropy(hidden, weight, head_rows(candidate, labels)))
        return torch.stack(losses).mean()


def train_supernet(
    supernet: Supernet, smallest: ModelConfig, draw: Callable[[random.Random], ModelConfig], config: StageConfig,
    data: PreparedStage, *, sampled: int = 2, seed: int = 0, log_every: int = 50,
    log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> None:  # fmt: skip
    """Take `config.steps` steps on this process, in place: each on the largest, the smallest and `sampled` random ones.

    Raises NonFiniteError before a step with a NaN is taken.
    """
    process = Process(device=supernet.weights_by_name["norm/weight"].device)
    module = SupernetModel(supernet, sandwich(supernet.largest, smallest, draw, sampled, seed))
    parallel = ParallelConfig()
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(BatchLoader(data, seed=seed, global_batch=config.global_batch))
        Trainer(
            stage="pretrain", config=config, process=process, module=module, teacher=None,
            optimizer=build_optimizer(module, config.optim), loader=loader,
            compute=partial(compute_context, parallel, None, process.device), clip=gradient_clipper(parallel),
            cadence=Cadence(log=log_every), log=log, save=lambda step: None, evaluate=lambda step: None,
            last_good=lambda: "none (a supernet is kept by who trains it)",
        ).fit()  # fmt: skip


def candidate_nll(supernet: Supernet, candidate: ModelConfig) -> TokenScores:
    """How `stages.evaluate` scores a candidate with the supernet's weights, as they are."""
    device = supernet.weights_by_name["norm/weight"].device

    @torch.no_grad()
    def token_nll(tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
        hidden, weight = supernet.hidden(candidate, tokens.to(device), None if positions is None else positions.to(device))
        return linear_token_nll(hidden, weight, head_rows(candidate, labels.to(device)))

    return token_nll


def save_supernet(supernet: Supernet, folder: str | Path, *, tokens: int, tokenizer: Tokenizer) -> None:
    """Write `supernet.safetensors`, `tokenizer.json` and, last, `supernet.json` with their SHA-256."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.cpu().contiguous() for name, tensor in supernet.state_dict().items()}, folder / WEIGHTS)
    tokenizer.save(folder / "tokenizer.json")
    document = {"largest": dataclasses.asdict(supernet.largest), "routing": supernet.routing, "experts": supernet.experts,
                "tokens": tokens, "files": {name: file_entry(folder / name) for name in (WEIGHTS, "tokenizer.json")}}
    beside = folder / ".supernet.json.part"
    write_durably(beside, json.dumps(document, indent=1).encode())
    beside.replace(folder / "supernet.json")


def load_supernet(folder: str | Path) -> tuple[Supernet, Tokenizer, int]:
    """A supernet, its tokenizer and the tokens it was trained on. Raises CheckpointError for what is damaged, by name."""
    folder = Path(folder)
    try:
        document = json.loads((folder / "supernet.json").read_text(encoding="utf-8"))
        supernet = Supernet(ModelConfig.from_plain(document["largest"]), document["routing"], document["experts"])
        files, tokens = dict(document["files"]), int(document["tokens"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'supernet.json'} is missing or damaged ({error}); expected a saved "
                              "supernet") from None  # fmt: skip
    for name in (WEIGHTS, "tokenizer.json"):
        if not (folder / name).is_file() or files.get(name) != file_entry(folder / name):
            raise CheckpointError(f"{folder / name} is missing or not what was written; train the supernet again")
    try:
        supernet.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is of another supernet ({' '.join(str(error).split())[:200]})") from None
    return supernet, Tokenizer.from_file(folder / "tokenizer.json"), tokens


def write_extracted(
    supernet: Supernet, candidate: ModelConfig, tokenizer: Tokenizer, output: str | Path, *, data: PreparedStage, tokens: int
) -> Path:
    """The candidate's weights as a checkpoint that `--init-from` takes; returns it.

    Args:
        data, tokens: what the supernet was trained on, for the lineage.
    """
    lineage = Lineage(
        parent=None, recipe_hash="", data_fingerprint=data.fingerprint, tokens_seen=tokens, stage="supernet", step=0,
        revision=code_revision(),
        pruning={"candidate": config_key(candidate), "routing": supernet.routing, "experts": supernet.experts,
                 "largest": dataclasses.asdict(supernet.largest)},
    )  # fmt: skip
    writer = CheckpointWriter(Path(output) / "checkpoints", CheckpointConfig(asynchronous=False, keep=1))
    documents: dict[str, dict[str, Any] | bytes] = {
        "model": model_document(candidate, None), "lineage": lineage.to_dict(),
        "tokenizer.json": tokenizer.to_json().encode(),
    }  # fmt: skip
    writer.save(0, {f"model.{name}": t.cpu() for name, t in supernet.extract(candidate).items()}, documents)
    return resolve(output)
