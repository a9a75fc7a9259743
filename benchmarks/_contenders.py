"""One contender in a fresh process; `train_step.py` starts `python benchmarks/_contenders.py NAME FOLDER STEPS`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import _shape as shape

if TYPE_CHECKING:
    from modeling.decoder import Decoder


def ours(folder: Path, steps: int, clock: shape.StepClock) -> None:
    """`stages.run.run_stages` as every command runs it: loader thread, metrics, W&B offline, checkpoint at the end."""
    from stages.config import CheckpointConfig
    from stages.distributed import init_process, shutdown
    from stages.run import StageJob, run_stages

    world = int(os.environ.get("WORLD_SIZE", "1"))
    output = folder / f"run-{world}-{os.environ['POCKETFORGE_BENCH_ROUND']}"
    job = StageJob(
        stage="pretrain", config=shape.stage_config(steps), train=shape.train_config(), model=shape.MODEL,
        tokenizer=shape.TOKENIZER, parallel=shape.PARALLEL, checkpoint=CheckpointConfig(), output_dir=str(output),
        cache_dir=str(folder / "data"), init_from=None, resume=False, run_name="train_step", recipe_hash="benchmark",
        wandb_mode="offline", held_out=(), held_out_fraction=shape.DATA.held_out_fraction,
    )  # fmt: skip
    process = init_process()
    try:
        run_stages([job], process)
    finally:
        shutdown()
    if process.rank == 0:
        lines = [json.loads(line) for line in (output / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        waited = [line["data_seconds"] / line["step_seconds"] for line in lines]
        # The first line holds the start of the loader, which no later step pays.
        name = "ours" if world == 1 else f"ours_{world}_workers"
        shape.report(folder, name, clock, steps, data_wait=max(waited[1:] or waited), first_loss=lines[0]["loss"])


Loss = Callable[["Decoder", Tensor, Tensor, Tensor], Tensor]
"""(model, tokens, positions, labels) -> mean loss."""


def _bare(
    folder: Path, steps: int, clock: shape.StepClock, name: str, loss_of: Loss, part: slice = slice(None)
) -> None:
    """What a person would write in a notebook: no accumulation, no logging, no checks. `part` of each batch's rows."""
    from modeling.decoder import Decoder
    from modeling.init import init_weights

    rows = {key: value[:, part] for key, value in shape.load_rows(folder).items()}
    model = Decoder(shape.MODEL)
    init_weights(model, shape.SEED)
    config = shape.OPTIM
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, eps=config.eps, betas=(config.beta1, config.beta2), fused=True,
        weight_decay=config.weight_decay,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = loss_of(model, rows["tokens"][step], rows["positions"][step], rows["labels"][step])
        if step == 0:
            first = loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    shape.report(folder, name, clock, steps, first_loss=first)


def bare(folder: Path, steps: int, clock: shape.StepClock) -> None:
    """The same Decoder, rows and optimizer, with `F.cross_entropy` on the whole logits."""

    def loss_of(model: Decoder, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens, positions).flatten(0, 1), labels.flatten())

    _bare(folder, steps, clock, "bare", loss_of)


def bare_same_loss(folder: Path, steps: int, clock: shape.StepClock) -> None:
    """As `bare`, with the loss function of our loop: what is left is the framework alone."""
    _bare(folder, steps, clock, "bare_same_loss", _our_loss)


def two_alone(folder: Path, steps: int, clock: shape.StepClock) -> None:
    """Two of `bare_same_loss` at once on half the rows each, which never speak: what two cores can do at best."""
    half, rank = shape.ROWS // 2, int(os.environ["RANK"])
    name = "two_alone" if rank == 0 else "two_alone_other"
    _bare(folder, steps, clock, name, _our_loss, slice(rank * half, (rank + 1) * half))


def _our_loss(model: Decoder, tokens: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    from stages.objectives import linear_cross_entropy

    hidden, weight = model.head_operands(model.hidden(tokens, positions))
    return linear_cross_entropy(hidden, weight, labels) / (labels != -100).sum()


def transformers_trainer(folder: Path, steps: int, clock: shape.StepClock) -> None:
    """`transformers.Trainer` on `LlamaForCausalLM` of the same shape. Plain causal attention, which is less work
    than ours: it does not keep the documents of a row apart."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    model, optim = shape.MODEL, shape.OPTIM
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads, head_dim=model.head_dim, rms_norm_eps=model.norm_eps,
        max_position_embeddings=model.max_positions, tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
    ))  # fmt: skip
    llama.set_attn_implementation("sdpa")
    rows = shape.load_rows(folder)
    # Its loss shifts by itself, so the labels go back to where their tokens are; the last of a row has no place.
    labels = F.pad(rows["labels"], (1, 0), value=-100)[..., :-1]
    examples = [{"input_ids": tokens, "labels": target}
                for tokens, target in zip(rows["tokens"].flatten(0, 1), labels.flatten(0, 1), strict=True)]  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=shape.ROWS,
        optim="adamw_torch_fused", learning_rate=optim.lr, adam_beta1=optim.beta1, adam_beta2=optim.beta2,
        adam_epsilon=optim.eps, weight_decay=optim.weight_decay, max_grad_norm=optim.clip_norm,
        lr_scheduler_type="cosine", warmup_steps=optim.warmup_steps, use_cpu=True, save_strategy="no",
        logging_steps=10, report_to="none", disable_tqdm=True, seed=shape.SEED,
    )  # fmt: skip
    result = Trainer(model=llama, args=arguments, train_dataset=examples).train()
    shape.report(folder, "transformers_trainer", clock, steps, mean_loss=result.training_loss)


def torchtitan_trainer(folder: Path, steps: int, clock: shape.StepClock) -> None:
    from benchmarks import _titan

    _titan.train(folder, steps, clock)


def prepare(folder: Path, steps: int, clock: shape.StepClock) -> None:
    shape.save_rows(folder, steps)


_ENTRIES = (prepare, ours, bare, bare_same_loss, two_alone, transformers_trainer, torchtitan_trainer)
CONTENDERS = {run.__name__: run for run in _ENTRIES}

if __name__ == "__main__":
    step_clock = shape.StepClock()
    step_clock.start()
    CONTENDERS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), step_clock)
