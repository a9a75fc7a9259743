"""The training loop. There is one; a stage says what data, which objective, what schedule."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data_pipeline.loader import Batch
from stages.balance import ExpertBalance
from stages.config import StageConfig, StageName
from stages.distributed import Process, all_reduce_sum
from stages.errors import NonFiniteError
from stages.objectives import TeacherModel, TrainableModel
from stages.optim import set_learning_rate
from stages.parallel.fsdp import set_gradient_sync
from stages.schedule import learning_rate

logger = logging.getLogger(__name__)


class Loader(Protocol):
    """What the loop asks of its data (`data_pipeline.loader.BatchLoader`)."""

    position: int

    def next_step(self) -> list[Batch]: ...


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """Every how many optimizer steps; 0 is never. The last step always logs and saves."""

    log: int
    save: int = 0
    evaluate: int = 0


@dataclass(kw_only=True)
class Window:
    """Clock of the steps since the last logged one. Evaluation and checkpoints are not in it."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass(kw_only=True)
class Trainer:
    """Takes `config.steps` optimizer steps from `step` on.

    The callbacks are plain calls at fixed places: `log(row)`, `save(step)`, `evaluate(step)`, and `last_good()` for
    the error message of a run that diverged.
    """

    stage: StageName
    config: StageConfig
    process: Process
    module: TrainableModel
    teacher: TeacherModel | None
    optimizer: torch.optim.Optimizer
    loader: Loader
    compute: Callable[[], AbstractContextManager[Any]]
    clip: Callable[[list[nn.Parameter], float], Tensor]
    cadence: Cadence
    log: Callable[[dict[str, Any]], None]
    save: Callable[[int], None]
    evaluate: Callable[[int], None]
    last_good: Callable[[], str]
    flops_per_token: float = 0.0
    balance: ExpertBalance | None = None
    """For a model with experts."""
    peak_flops: float | None = None
    """Of all workers together; None where the device's peak is not known."""
    step: int = 0
    """Optimizer steps taken."""
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def fit(self) -> None:
        """Train to the stage's last step. Raises NonFiniteError, on every rank, before a step with a NaN is taken."""
        window = Window()
        while self.step < self.config.steps:
            started = time.perf_counter()
            batches = self.loader.next_step()
            window.data_seconds += time.perf_counter() - started
            rate = learning_rate(self.config.optim, self.step + 1, self.config.steps)
            loss, norm = self.train_step(batches, rate)
            self.step += 1
            window.seconds += time.perf_counter() - started
            window.steps += 1
            if self._due(self.cadence.log) or self.step == 1:
                self.log(self._row(loss, norm, rate, window))
                window = Window()
            if self._due(self.cadence.save):
                self.save(self.step)
            if self.cadence.evaluate and self.step % self.cadence.evaluate == 0 and self.step < self.config.steps:
                self.evaluate(self.step)

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def train_step(self, batches: list[Batch], rate: float) -> tuple[float, float]:
        """One optimizer step over this rank's micro-batches; returns the global mean loss and gradient norm."""
        tokens = self._global_tokens(batches)
        total = torch.zeros((), device=self.process.device)
        for index, batch in enumerate(batches):
            set_gradient_sync(self.module, index == len(batches) - 1)
            loss = self._forward(batch) / tokens
            loss.backward()
            total += loss.detach()
        norm = self.clip(self.parameters, self.config.optim.clip_norm)
        all_reduce_sum(total, self.process)
        mean_loss, grad_norm = torch.stack([total, norm]).tolist()  # the one place that waits for the device
        self._check_finite(mean_loss, grad_norm)
        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.balance is not None:
            self.balance.step()
        return mean_loss, grad_norm

    def _global_tokens(self, batches: list[Batch]) -> Tensor:
        """Supervised tokens of the global batch, as a scalar on the device: what the summed loss is divided by."""
        count = torch.tensor(float(sum(batch.supervised_tokens for batch in batches)))
        return all_reduce_sum(count.to(self.process.device), self.process).clamp(min=1.0)

    def _forward(self, batch: Batch) -> Tensor:
        device = self.process.device
        tokens, positions, labels = (
            part.to(device, non_blocking=True) for part in (batch.tokens, batch.positions, batch.labels)
        )
        with self.compute():
            said = None if self.teacher is None else self.teacher(tokens, positions)
            loss: Tensor = self.module(tokens, positions, labels, said)
        if self.balance is not None and self.module.record is not None:
            self.balance.watch(self.module.record)
            self.module.record = None  # it holds the graph
        return loss

    def _check_finite(self, loss: float, norm: float) -> None:
        # Both numbers are the same on every rank, so all raise together and none waits in a collective.
        if abs(loss) < float("inf") and abs(norm) < float("inf"):
            return
        raise NonFiniteError(
            f"{self.stage} step {self.step + 1}: loss {loss}, gradient norm {norm}; expected finite numbers, and took "
            f"no step with these. The last good checkpoint is {self.last_good()}; lower {self.stage}.optim.lr or check "
            "the data, then start a new run with --init-from, or go on with --resume if the cause was outside the run"
        )

    def _row(self, loss: float, norm: float, rate: float, window: Window) -> dict[str, Any]:
        tokens = self.config.global_batch * self.config.seq_len
        per_second = tokens * window.steps / window.seconds
        row: dict[str, Any] = {
            "stage": self.stage, "step": self.step, "tokens": self.step * tokens, "loss": loss, "lr": rate,
            "grad_norm": norm, "tokens_per_second": per_second, "step_seconds": window.seconds / window.steps,
            "data_seconds": window.data_seconds / window.steps, "window_steps": window.steps,
        }  # fmt: skip
        if self.peak_flops:
            row["mfu"] = per_second * self.flops_per_token / self.peak_flops
        if self.balance is not None:
            row["moe"] = self.balance.row()
        logger.info("%s step %d/%d loss %.4f lr %.2e norm %.3f %.0f tok/s", self.stage, self.step, self.config.steps,
                    loss, rate, norm, per_second)  # fmt: skip
        return row
