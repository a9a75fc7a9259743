"""metrics.jsonl and the W&B run beside it."""

from __future__ import annotations

import json
import sys
import types

import pytest

from stages.metrics import MetricsFile, WandbLog
from tests.helpers.stage_jobs import change, losses, pretrain_job, run_job


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "stage" / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1.0 / step})
    path.write_bytes(path.read_bytes() + b'{"step": 2, "lo')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": 0.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.0


def test_a_number_that_json_has_no_word_for_is_null(tmp_path):
    MetricsFile(tmp_path / "m.jsonl", 0).write({"step": 1, "mfu": float("nan")})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "mfu": null}\n'


def test_a_run_without_network_is_logged_offline_with_its_group(tmp_path):
    job = change(pretrain_job(tmp_path, steps=3), wandb_mode="offline")
    run_job(job)
    (run,) = (job.folder / "wandb").glob("offline-run-*")
    written = next(run.glob("run-*.wandb")).read_bytes()
    for text in (b"test-pretrain", b"tokens_per_second", b"recipe_hash"):
        assert text in written


@pytest.mark.parametrize("fails_in", ["import", "init", "log", "finish"])
def test_whatever_wandb_does_the_run_goes_on_with_one_warning(tmp_path, monkeypatch, caplog, fails_in):
    def fail(*_, **__):
        raise RuntimeError("no space left for wandb")

    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.Settings = lambda **_: None
    fake.init = fail if fails_in == "init" else lambda **_: run
    if fails_in in ("log", "finish"):
        setattr(run, fails_in, fail)
    monkeypatch.setitem(sys.modules, "wandb", None if fails_in == "import" else fake)
    job = change(pretrain_job(tmp_path, steps=2), wandb_mode="offline")
    run_job(job)
    assert len(losses(job)) == 2
    warnings = [record for record in caplog.records if record.name == "stages.metrics"]
    assert len(warnings) == 1 and "the run goes on" in warnings[0].getMessage()


def test_a_wandb_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog):
    import threading

    hang = threading.Event()
    fake = types.ModuleType("wandb")
    fake.Settings = lambda **_: None
    fake.init = lambda **_: hang.wait()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = WandbLog(tmp_path, mode="offline", group="g", name="n", config={})
    log.write({"step": 1})
    log.close(timeout_seconds=0.1)
    hang.set()
    assert "did not finish" in caplog.text
