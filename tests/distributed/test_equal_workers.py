"""N workers and one worker with the same global batch: the same losses and gradient norms, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.stage_jobs import MODEL, change, pretrain_job, read_metrics, run_job


def _run_all(jobs, rank, world):
    for job in jobs:
        run_job(job, rank, world)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Six steps in which clipping is at work: the norm is far above 0.05."""
    return pretrain_job(tmp_path_factory.mktemp("equal"), clip_norm=0.05)


@pytest.fixture(scope="module")
def alone(base):
    return _curve(_run_alone(base, "alone"))


def _run_alone(job, name):
    job = change(job, output_dir=f"{job.output_dir}-{name}")
    run_job(job)
    return job


def _curve(job):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(job)]


def _assert_same(curve, expected):
    assert len(curve) == 6
    for (loss, norm), (wanted_loss, wanted_norm) in zip(curve, expected, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-4)


def test_two_workers_equal_one(base, alone):
    repeated = change(base, model=replace(MODEL, block_repeat=2))
    jobs = {
        "plain": base,
        "accumulated": change(base, micro_batch=1),
        "gathered": change(base, reshard_after_forward=False),
        "recomputed": change(base, activation_checkpointing="block"),
        "repeated": repeated,
        "bf16": change(base, precision="bf16"),
    }
    jobs = {name: change(job, output_dir=f"{base.output_dir}-two-{name}") for name, job in jobs.items()}
    run_distributed(_run_all, 2, args=(list(jobs.values()),))

    half = [loss for loss, _ in _curve(jobs.pop("bf16"))]
    fp32 = [loss for loss, _ in alone]
    assert half == pytest.approx(fp32, rel=0.01) and half != fp32
    _assert_same(_curve(jobs.pop("repeated")), _curve(_run_alone(repeated, "repeated")))
    for job in jobs.values():
        _assert_same(_curve(job), alone)


def test_four_workers_in_two_replicas_equal_one(base, alone):
    job = change(base, replicate=2, output_dir=f"{base.output_dir}-four")
    run_distributed(_run_all, 4, args=([job],))
    _assert_same(_curve(job), alone)
