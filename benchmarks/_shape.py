"""What every contender of `train_step.py` trains: one shape, one data set, one optimizer; and how a step is timed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from modeling.config import ModelConfig
from stages.config import OptimConfig, ParallelConfig, StageConfig, TrainConfig

SEQ_LEN, ROWS = 256, 16
TOKENS_PER_STEP = SEQ_LEN * ROWS
SEED = 0

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=256, num_layers=6, num_heads=4, num_kv_heads=2, ffn_size=768, max_positions=SEQ_LEN
)
TOKENIZER = TokenizerConfig(vocab_size=MODEL.vocab_size, train_bytes=4_000_000)
# Text that lies on every machine with Python, so the benchmark needs no download.
DATA = DataConfig(sources=(SourceConfig(name="python", format="python_docs", max_bytes=8_000_000),))
# As the quickstart has it: the model is small enough to stay whole between the forward and the backward pass.
PARALLEL = ParallelConfig(reshard_after_forward=False)
OPTIM = OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=2)


def stage_config(steps: int) -> StageConfig:
    """Pre-training of the shape; the other contenders take the optimizer's numbers from here."""
    return StageConfig(data=DATA, optim=OPTIM, steps=steps, seq_len=SEQ_LEN, global_batch=ROWS)


def train_config() -> TrainConfig:
    """As a recipe has it by default, but no held-out sets, and a log line far more often than usual."""
    return TrainConfig(seed=SEED, log_every=2)


@dataclass
class StepClock:
    """Notes the time after every optimizer step of this process, whoever's loop calls it."""

    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    """Of all threads of this process: says what a step costs even where other programs take the cores."""

    def start(self) -> None:
        """One hook for every optimizer in torch: the same instrument for every contender."""
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self._tick)

    def _tick(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, torch.optim.AdamW):  # and not a container around it that counts as an optimizer too
            self.times.append(time.perf_counter())
            self.cpu_times.append(time.process_time())

    def durations(self, steps: int) -> list[float]:
        """Seconds from each step's end to the next one's: all that a loop does for a step is in between.

        Raises RuntimeError where the loop did not take exactly `steps` steps.
        """
        if len(self.times) != steps:
            raise RuntimeError(f"the loop took {len(self.times)} optimizer steps; expected {steps}")
        return _differences(self.times)

    def cpu_durations(self) -> list[float]:
        """CPU seconds of the same intervals."""
        return _differences(self.cpu_times)


def _differences(times: list[float]) -> list[float]:
    return [b - a for a, b in zip(times, times[1:], strict=False)]


def save_rows(folder: Path, steps: int) -> None:
    """Write the batches that our loop will see as three arrays [steps, rows, length]."""
    from data_pipeline.loader import BatchLoader
    from data_pipeline.prepare import ensure_tokenizer, prepare_stage

    tokenizer = ensure_tokenizer(TOKENIZER, DATA, folder / "data", SEED)
    prepared = prepare_stage(DATA, tokenizer, SEQ_LEN, folder / "data", SEED)
    with BatchLoader(prepared, seed=SEED, global_batch=ROWS) as loader:
        batches = [loader.next_step()[0] for _ in range(steps)]
    for name in ("tokens", "labels", "positions"):
        np.save(folder / f"{name}.npy", torch.stack([getattr(batch, name) for batch in batches]).numpy())


def load_rows(folder: Path) -> dict[str, torch.Tensor]:
    """Those batches, in memory: int64 [steps, rows, length] under `tokens`, `labels`, `positions`."""
    return {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("tokens", "labels", "positions")}


def report(folder: Path, name: str, clock: StepClock, steps: int, **more: Any) -> None:
    """Leave the result for the parent process."""
    result = {"durations": clock.durations(steps), "cpu_durations": clock.cpu_durations(), **more}
    (folder / f"{name}.json").write_text(json.dumps(result))
