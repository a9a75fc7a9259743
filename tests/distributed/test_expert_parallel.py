"""Experts spread over workers: what one process computes, step by step; and checkpoints that hold all experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.moe_config import MoEConfig
from stages.checkpoint import load_full
from stages.config import MoETrainConfig, ParallelConfig
from stages.errors import InputError
from stages.parallel.mesh import check_world
from tests.helpers.distributed import run_distributed
from tests.helpers.stage_jobs import MODEL, change, losses, pretrain_job, read_metrics, run_job

MOE = replace(MODEL, moe=MoEConfig(num_experts=8, top_k=3, expert_size=24, shared_size=32))


def _run_all(jobs, rank, world):
    for job in jobs:
        run_job(job, rank, world)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return pretrain_job(tmp_path_factory.mktemp("experts"), model=MOE, clip_norm=0.05, micro_batch=1,
                        moe=MoETrainConfig(bias_rate=0.01, z_weight=1e-3))  # fmt: skip


def named(job, name, **changes):
    return change(job, output_dir=f"{job.output_dir}-{name}", **changes)


@pytest.fixture(scope="module")
def alone(base):
    job = named(base, "alone")
    run_job(job)
    return job


def state(job):
    return load_full(next(iter(sorted((job.folder / "checkpoints").glob("step-*")))))


def assert_same(job, wanted):
    """Losses and norms (forward, backward), loads and biases (balance), and every weight (the optimizer's step)."""
    mine, theirs = read_metrics(job), read_metrics(wanted)
    assert len(mine) == len(theirs) == 6
    for row, other in zip(mine, theirs, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["moe"]["load"] == other["moe"]["load"] and row["moe"]["dropped"] == other["moe"]["dropped"]
        assert row["moe"]["z"] == pytest.approx(other["moe"]["z"], rel=1e-4)
    got, want = state(job), state(wanted)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        if name.endswith("router.bias"):
            assert tensor.any() and torch.equal(got[name], tensor)
        torch.testing.assert_close(got[name], tensor, atol=2e-4, rtol=1e-3)


def test_two_workers_with_all_ways_of_sharing_equal_one(base, alone):
    jobs = {
        "shards": named(base, "shards"),
        "experts": named(base, "two", expert=2),
        "recomputed": named(base, "recomputed", expert=2, activation_checkpointing="block"),
        "gathered": named(base, "gathered", expert=2, reshard_after_forward=False),
    }
    capacity = named(base, "capacity", moe=MoETrainConfig(dispatch="capacity", capacity_factor=1.0))
    spread = named(capacity, "two", expert=2)
    half = named(base, "bf16", expert=2, precision="bf16")
    run_distributed(_run_all, 2, args=([*jobs.values(), spread, half],))
    for job in jobs.values():
        assert_same(job, alone)
    run_job(capacity)
    assert max(read_metrics(capacity)[0]["moe"]["dropped"]) > 0.05
    assert_same(spread, capacity)
    assert losses(half) == pytest.approx(losses(alone), rel=0.01) and losses(half) != losses(alone)


def test_four_workers_equal_one(base, alone):
    jobs = [named(base, "four", expert=4), named(base, "two-two", expert=2), named(base, "replicas", expert=2, replicate=2)]
    run_distributed(_run_all, 4, args=(jobs,))
    for job in jobs:
        assert_same(job, alone)


def test_a_checkpoint_goes_on_with_any_other_spread(base, alone):
    """One process, then two that share the experts, then four with two each, then one: as if never stopped."""
    parts = named(base, "parts", schedule="constant")
    whole = named(base, "whole", schedule="constant")
    run_job(whole)
    run_job(change(parts, steps=1))
    run_distributed(_run_all, 2, args=([change(parts, steps=3, expert=2)],))
    run_distributed(_run_all, 4, args=([change(parts, steps=5, expert=2)],))
    run_job(parts)
    for row, other in zip(read_metrics(parts), read_metrics(whole), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["moe"]["load"] == other["moe"]["load"]
    path = sorted((parts.folder / "checkpoints").glob("step-*"))[-1]
    assert load_full(path)["blocks.0.feed_forward.experts.gate_up"].shape == (8, 32, 48)


@pytest.mark.parametrize(("parallel", "world", "model", "words"), [
    (ParallelConfig(expert=3), 4, MOE, "parallel.expert=3 with 4 workers that shard: expected a divisor"),
    (ParallelConfig(expert=4, replicate=2), 4, MOE, "parallel.expert=4 with 2 workers that shard"),
    (ParallelConfig(expert=3), 3, MOE, "parallel.expert=3 does not divide model.moe.num_experts=8"),
    (ParallelConfig(expert=2), 2, MODEL, "parallel.expert=2, but the model has no experts"),
    (ParallelConfig(expert=2), 10, MOE, "model.hidden_size=32 cannot be sharded evenly over 5 workers"),
    (ParallelConfig(expert=2, library="torchtitan"), 2, MOE, "parallel.library=torchtitan"),
])  # fmt: skip
def test_a_spread_that_cannot_be_is_refused(parallel: ParallelConfig, world: int, model: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_world(parallel, world, model)  # type: ignore[arg-type]


def test_a_single_process_refuses_to_spread(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="parallel.expert=2 with 1 workers"):
        run_job(pretrain_job(tmp_path, model=MOE, expert=2))
