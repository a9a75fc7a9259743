"""A stopped run goes on: bit-equal on as many workers, to rounding on another number; a NaN stops all together."""

from __future__ import annotations

import shutil

import pytest

from stages.errors import InputError, NonFiniteError
from tests.helpers.distributed import run_distributed
from tests.helpers.stage_jobs import change, losses, pretrain_job, read_metrics, run_job


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the stage's own handles it."""


def _stop_at(job, step, rank, world):
    """Train, and die before step `step` + 1."""
    from stages.trainer import Trainer

    train_step = Trainer.train_step

    def step_or_die(self, *args):
        if self.step == step:
            raise Killed
        return train_step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_or_die)
        with pytest.raises(Killed):
            run_job(job, rank, world)


def _on_two_workers(straight, stopped, of_one, copy, rank, world):
    run_job(straight, rank, world)
    _stop_at(stopped, 5, rank, world)
    if rank == 0:
        assert [row["step"] for row in read_metrics(stopped)] == [1, 2, 3, 4, 5]
        shutil.copytree(stopped.output_dir, copy)
    run_job(stopped, rank, world)
    run_job(of_one, rank, world)


def test_a_stopped_run_goes_on_with_any_number_of_workers(tmp_path):
    straight = pretrain_job(tmp_path, steps=8)
    stopped, of_one, of_two = (
        change(straight, output_dir=str(tmp_path / name), every=3) for name in ("stopped", "of_one", "of_two")
    )
    _stop_at(of_one, 5, 0, 1)
    run_distributed(_on_two_workers, 2, args=(straight, stopped, of_one, of_two.output_dir))
    run_job(of_two)

    for job in (stopped, of_one, of_two):
        assert [row["step"] for row in read_metrics(job)] == list(range(1, 9))
        assert losses(job) == pytest.approx(losses(straight), rel=1e-5)
    assert losses(stopped) == losses(straight)
    assert losses(of_two)[:3] == losses(straight)[:3] and losses(of_two)[3:] != losses(straight)[3:]


def _diverge(job, rank, world):
    """Only rank 1 sees a NaN."""
    from stages.objectives import TrainableModel

    forward = TrainableModel.forward
    calls = []

    def poisoned(self, *args, **kwargs):
        calls.append(None)
        return forward(self, *args, **kwargs) * (float("nan") if rank == 1 and len(calls) == 4 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainableModel, "forward", poisoned)
        with pytest.raises(NonFiniteError) as caught:
            run_job(job, rank, world)
    with pytest.raises(InputError, match="global_batch=5 over 2 workers"):
        run_job(change(job, global_batch=5), rank, world)
    with pytest.raises(InputError, match="parallel.replicate=3 with 2 workers"):
        run_job(change(job, replicate=3), rank, world)
    return str(caught.value)


def test_a_nan_on_one_worker_stops_all_with_one_message(tmp_path):
    messages = run_distributed(_diverge, 2, args=(pretrain_job(tmp_path, every=2),))
    assert messages[0] == messages[1]
    assert "pretrain step 4" in messages[0] and "step-000002" in messages[0]
