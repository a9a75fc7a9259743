"""The file of a stage's held-out scores, and what happens when it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipeline.config import HeldOutConfig
from tests.helpers.stage_jobs import pretrain_job, run_job


@pytest.fixture
def job(tmp_path):
    plain = pretrain_job(tmp_path, steps=1)
    return replace(plain, held_out=((HeldOutConfig(name="texts", sources=("texts",), max_documents=2),
                                     plain.config.data.sources),))  # fmt: skip


@pytest.mark.parametrize(
    "content", ['{"before": {"te', "[]", '{"after": 3}', '{"after": {"texts": {"loss": "x"}}}', "[" * 9000],
    ids=["cut short", "a list", "no table", "no numbers", "deep"],
)  # fmt: skip
def test_a_damaged_file_is_moved_aside_and_scored_again(job, caplog, content):
    run_job(job)
    path = job.folder / "evaluation.json"
    scores = json.loads(path.read_text())
    path.write_text(content)
    run_job(job)
    said = [record.getMessage() for record in caplog.records if record.name == "stages.held_out"]
    assert len(said) == 1 and str(path) in said[0] and "\n" not in said[0]
    assert json.loads(path.read_text())["after"] == scores["after"]
    assert path.with_name("evaluation.json.damaged").read_text() == content


def test_a_good_file_is_left_alone(job):
    run_job(job)
    before = (job.folder / "evaluation.json").read_bytes()
    assert run_job(job).skipped
    assert (job.folder / "evaluation.json").read_bytes() == before
