"""Running stages: from a job to a trained, scored and saved model."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from data_pipeline.loader import BatchLoader
from data_pipeline.prepare import PreparedStage, prepare_stage
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.init import init_weights
from quant.apply import prepare as quantize
from quant.spec import QuantSpec
from stages.balance import ExpertBalance, wandb_row
from stages.checkpoint import CheckpointWriter, latest
from stages.distributed import Process
from stages.errors import CheckpointError, InputError
from stages.held_out import HeldOutScores
from stages.job import KINDS, StageJob, StageResult, Start, check_job, find_start, find_tokenizer
from stages.lineage import Lineage
from stages.metrics import MetricsFile, WandbLog, peak_flops, warn_of_lost_steps
from stages.objectives import TeacherModel, TrainableModel
from stages.optim import build_optimizer
from stages.parallel.fsdp import compute_context, gradient_clipper, parallelize
from stages.parallel.mesh import build_mesh
from stages.state import (
    RunState,
    code_revision,
    load_weights,
    model_document,
    model_tensors,
    restore,
    training_tensors,
)
from stages.trainer import Cadence, Trainer

__all__ = ["StageJob", "StageResult", "run_stages"]

logger = logging.getLogger(__name__)


def run_stages(jobs: list[StageJob], process: Process) -> list[StageResult]:
    """Run the jobs in order; a stage that is complete is skipped, one that was cut short goes on.

    Raises, on every rank:
        InputError, DataError: the jobs, their data or their checkpoints are wrong.
        RunError: the run diverged, or could not write.
    """
    for job in jobs:
        check_job(job, process)
    return [run_stage(job, process) for job in jobs]


def run_stage(job: StageJob, process: Process) -> StageResult:
    """One stage: prepare, score, train, save, score."""
    start = find_start(job, process)
    scores = HeldOutScores(job, process)
    if start.resumed is not None and start.step >= job.config.steps and scores.complete:
        logger.info("%s is complete (%s)", job.stage, start.resumed)
        if process.is_first:
            warn_of_lost_steps(job.folder / "metrics.jsonl", start.step, job.train.log_every)
        return StageResult(stage=job.stage, step=start.step, checkpoint=start.resumed, skipped=True)

    tokenizer = find_tokenizer(job, start)
    data = _prepare_data(job, start, tokenizer)
    mesh = build_mesh(job.parallel, process)
    torch.manual_seed((job.seed + process.rank) % 2**63)  # torch takes 64 bits; a stage's seed is four times the run's
    module = _build_student(job, start, mesh, process)
    teacher = _build_teacher(job, start, tokenizer, mesh, process)
    optimizer = build_optimizer(module, job.config.optim)
    if start.resumed is not None:
        restore(start.resumed, module, optimizer, process)

    compute = partial(compute_context, job.parallel, mesh, process.device)
    score = partial(scores.score, module, tokenizer, start.model, compute)
    if start.step == 0:
        score("before")
    if start.step < job.config.steps:
        scores.forget_after()
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(_loader(job, start, data, process))
        log = stack.enter_context(_metrics(job, start, process))
        saver = _Saver(job, start, module, optimizer, loader, tokenizer, data, process)
        stack.enter_context(saver)
        trainer = Trainer(
            stage=job.stage, config=job.config, process=process, module=module, teacher=teacher, optimizer=optimizer,
            loader=loader, compute=compute, clip=gradient_clipper(job.parallel),
            cadence=Cadence(log=job.train.log_every, save=job.checkpoint.every, evaluate=job.train.eval_every),
            log=log, save=saver.save, evaluate=score, last_good=saver.last_good, step=start.step,
            flops_per_token=start.model.flops_per_token(job.config.seq_len // 2, training=True),
            peak_flops=_group_peak(job, process),
            balance=ExpertBalance(module.model, job.config.moe, process) if start.model.num_moe_layers else None,
        )  # fmt: skip
        trainer.fit()
    score("after")
    final = latest(job.folder / "checkpoints")
    assert final is not None, "the saver waited for it"
    return StageResult(stage=job.stage, step=trainer.step, checkpoint=final, skipped=False)


def _prepare_data(job: StageJob, start: Start, tokenizer: Tokenizer) -> PreparedStage:
    data = prepare_stage(job.config.data, tokenizer, job.config.seq_len, job.cache_dir, job.train.seed)
    data.plan(job.config.steps, job.config.global_batch, job.seed)
    if start.state is not None and start.state.data_fingerprint != data.fingerprint:
        raise CheckpointError(
            f"the data of {job.stage} is not what {start.resumed} was trained on (fingerprint {data.fingerprint[:12]}, "
            f"was {start.state.data_fingerprint[:12]}); bring back the old files, or start in another --output-dir"
        )
    return data


def build_decoder(config: ModelConfig, quant: QuantSpec | None = None) -> Decoder:
    """A decoder on the meta device: shapes without memory, until its weights are known."""
    with torch.device("meta"):
        model = Decoder(config)
        if quant is not None:
            quantize(model, quant)
    return model


def _build_student(job: StageJob, start: Start, mesh: DeviceMesh | None, process: Process) -> TrainableModel:
    """The stage's model, prepared and sharded, holding its parent's weights or fresh ones."""
    model = build_decoder(start.model)
    KINDS[job.stage].prepare(model, job.config)
    module = TrainableModel(model, job.config.distill, job.config.moe)
    if start.parent is None and start.resumed is None:
        # Every rank makes the same whole model, then keeps its shard: the weights do not depend on the world size.
        module.to_empty(device=process.device)
        init_weights(model, job.train.seed)
        parallelize(module, job.parallel, mesh)
        return module
    parallelize(module, job.parallel, mesh)
    module.to_empty(device=process.device)
    if start.resumed is None and start.parent is not None:
        load_weights(start.parent, model_tensors(module), process)
    return module


def _build_teacher(
    job: StageJob, start: Start, tokenizer: Tokenizer, mesh: DeviceMesh | None, process: Process
) -> TeacherModel | None:
    """The frozen model that the stage learns from, sharded like the student."""
    distill = job.config.distill
    if distill is None:
        return None
    if distill.teacher == "init":
        if start.parent is None or start.parent_model is None:
            raise CheckpointError(f"{job.stage} learns from {start.parent_name}, the checkpoint it started from, which is "
                                  "gone; bring it back, or start the stage anew in another --output-dir")
        teacher = TeacherModel(build_decoder(start.parent_model, start.parent_quant))
        parallelize(teacher, job.parallel, mesh)
        teacher.to_empty(device=process.device)
        load_weights(start.parent, model_tensors(teacher), process)
        return teacher
    from stages.loading import load_model

    loaded = load_model(distill.teacher)
    if loaded.tokenizer is None or loaded.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"{job.stage}.distill.teacher={distill.teacher} has another tokenizer than the student; distillation "
            "compares logits id by id, so take a teacher with the same tokenizer.json"
        )
    teacher = TeacherModel(loaded.model.to(process.device))
    parallelize(teacher, job.parallel, mesh)
    return teacher


def _loader(job: StageJob, start: Start, data: PreparedStage, process: Process) -> BatchLoader:
    return BatchLoader(
        data, seed=job.seed, global_batch=job.config.global_batch, rank=process.rank, world=process.world,
        micro_batch=job.config.micro_batch, start_sequence=0 if start.state is None else start.state.sequence,
    )  # fmt: skip


def _group_peak(job: StageJob, process: Process) -> float | None:
    peak = peak_flops(process.device, job.parallel.precision)
    return None if peak is None else peak * process.world


@contextlib.contextmanager
def _metrics(job: StageJob, start: Start, process: Process) -> Iterator[Callable[[dict[str, object]], None]]:
    """Where rank 0's rows go; other ranks' go nowhere, for they are the same."""
    if not process.is_first:
        yield lambda row: None
        return
    file = MetricsFile(job.folder / "metrics.jsonl", start.step)
    warn_of_lost_steps(file.path, start.step, job.train.log_every)
    wandb = WandbLog(
        job.folder, mode=job.wandb_mode, project=job.wandb_project, group=job.run_name, name=f"{job.run_name}-{job.stage}",
        config={"recipe_hash": job.recipe_hash, "stage": job.stage, "workers": process.world,
                "model": model_document(start.model, job.config.quant)},
    )  # fmt: skip

    def write(row: dict[str, object]) -> None:
        file.write(row)
        wandb.write(wandb_row(row))

    try:
        yield write
    finally:
        wandb.close()


@dataclass
class _Saver:
    """Writes the stage's checkpoints; leaving the block waits for the one under way."""

    job: StageJob
    start: Start
    module: TrainableModel
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    tokenizer: Tokenizer
    data: PreparedStage
    process: Process

    def __post_init__(self) -> None:
        root = self.job.folder / "checkpoints"
        self.writer = CheckpointWriter(root, self.job.checkpoint, self.process.rank, self.process.world)

    def save(self, step: int) -> None:
        job = self.job
        tokens = step * job.config.global_batch * job.config.seq_len
        state = RunState(
            stage=job.stage, step=step, tokens=tokens, sequence=self.loader.position, seed=job.seed,
            data_fingerprint=self.data.fingerprint, world=self.process.world, global_batch=job.config.global_batch,
        )  # fmt: skip
        lineage = Lineage(
            parent=self.start.parent_name, recipe_hash=job.recipe_hash, data_fingerprint=self.data.fingerprint,
            tokens_seen=self.start.parent_tokens + tokens, stage=job.stage, step=step, revision=code_revision(),
        )  # fmt: skip
        documents: dict[str, dict[str, Any] | bytes] = {
            "model": model_document(self.start.model, job.config.quant), "state": state.to_dict(),
            "lineage": lineage.to_dict(), "tokenizer.json": self.tokenizer.to_json().encode(),
        }  # fmt: skip
        self.writer.save(step, training_tensors(self.module, self.optimizer, self.process), documents)

    def last_good(self) -> str:
        """For an error message: the newest checkpoint, after the one under way has been committed."""
        self.writer.wait()
        found = latest(self.job.folder / "checkpoints") or self.start.parent
        return str(found) if found is not None else "none (the run had not saved yet)"

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.wait()
