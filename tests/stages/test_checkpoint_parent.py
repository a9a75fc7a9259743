"""A stage that goes on keeps the parent it started from: in its lineage, its count of tokens, and as its teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from stages.checkpoint import latest, read_document
from stages.config import DistillConfig
from stages.errors import CheckpointError
from tests.helpers.stage_jobs import change, losses, pretrain_job, run_job


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Jobs of a pre-training and a self-distilled mid-training of two steps each, both run."""
    folder = tmp_path_factory.mktemp("parent")
    first = pretrain_job(folder, steps=2, lr=1e-2)
    second = change(first, stage="midtrain", init_from=f"{first.output_dir}/pretrain", seq_len=16,
                    distill=DistillConfig(teacher="init"))  # fmt: skip
    run_job(first)
    run_job(second)
    return first, second


def copied(jobs, folder):
    """The same jobs in a copy of their run, two steps longer."""
    run = shutil.copytree(jobs[0].output_dir, folder / "copy")
    return [change(job, output_dir=str(run), steps=4, init_from=job.init_from and f"{run}/pretrain") for job in jobs]


def lineage(job):
    return read_document(latest(job.folder / "checkpoints"), "lineage")


def test_the_parent_stays_when_the_earlier_stage_was_trained_further(finished, tmp_path):
    before = lineage(finished[1])
    longer, second = copied(finished, tmp_path / "a")
    run_job(longer)
    run_job(second)
    assert lineage(longer)["step"] == lineage(second)["step"] == 4
    assert lineage(second)["parent"] == before["parent"] and before["parent"].endswith("pretrain/checkpoints/step-000002")
    assert lineage(second)["tokens_seen"] - before["tokens_seen"] == 2 * 4 * 16
    _, alone = copied(finished, tmp_path / "b")
    run_job(alone)
    assert losses(second) == losses(alone), "the teacher is the old parent too"


def test_a_run_that_was_moved_finds_its_parent_again(finished, tmp_path):
    _, second = copied(finished, tmp_path)
    elsewhere = Path(finished[0].output_dir).rename(tmp_path / "elsewhere")
    try:
        run_job(second)
        shutil.rmtree(second.folder.parent / "pretrain")
        gone = change(second, steps=6)
        with pytest.raises(CheckpointError, match="step-000002, the checkpoint it started from, which is gone"):
            run_job(gone)
        run_job(change(gone, distill=None))
        assert lineage(gone)["parent"].endswith("step-000002")
    finally:
        elsewhere.rename(finished[0].output_dir)
