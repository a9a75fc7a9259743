"""metrics.jsonl and the W&B run beside it."""

from __future__ import annotations

import json
import struct
import sys
import types
from dataclasses import replace

import pytest

from stages.metrics import MetricsFile, WandbLog, lost_steps
from stages.wandb_file import records
from tests.helpers.stage_jobs import change, losses, pretrain_job, run_job
from tests.helpers.wandb_rows import logged


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


@pytest.mark.parametrize(
    ("lines", "log_every", "lost"),
    [
        ([(1, 1), (2, 1), (3, 1), (4, 1)], 1, []),
        ([(1, 1), (4, 1)], 1, [2, 3]),
        ([], 1, [1, 2, 3, 4]),
        ([(1, 1), (2, 1), "{torn", (4, 1)], 1, [3]),
        ([(1, 1), (2, 1), "[" * 5000, {"step": "4"}], 1, [3, 4]),
        ([(1, 1), (4, 3)], 1, []),  # logged less often in an earlier start
        ([(1, 1), (2, 1)], 3, [3]),
        ([(1, None), (4, None)], 1, []),  # of a version that did not say what a line covers
    ],
)
def test_steps_without_a_line_are_found(tmp_path, lines, log_every, lost):
    path = tmp_path / "metrics.jsonl"
    rows = [row if isinstance(row, str) else json.dumps(row) if isinstance(row, dict)
            else json.dumps({"step": row[0], **({"window_steps": row[1]} if row[1] else {})}) for row in lines]
    path.write_text("".join(row + "\n" for row in rows))
    assert lost_steps(path, 4, log_every) == lost


def test_a_resumed_stage_says_which_lines_it_lost(tmp_path, caplog):
    job = pretrain_job(tmp_path, steps=4)
    run_job(job)
    path = job.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:]))
    run_job(job)
    run_job(change(job, steps=5))
    said = [record.getMessage() for record in caplog.records if record.name == "stages.metrics"]
    assert len(said) == 2 and all("metrics.jsonl" in line and "no line covers step 2;" in line for line in said)


def test_a_number_that_json_has_no_word_for_is_null(tmp_path):
    MetricsFile(tmp_path / "m.jsonl", 0).write({"step": 1, "mfu": float("nan")})
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "mfu": null}\n'


def test_a_run_without_network_is_logged_offline_with_its_group(tmp_path):
    job = change(pretrain_job(tmp_path, steps=3), wandb_mode="offline")
    job = replace(job, wandb_project="small-models")
    run_job(job)
    (run,) = (job.folder / "wandb").glob("offline-run-*")
    written = next(run.glob("run-*.wandb")).read_bytes()
    for text in (b"test-pretrain", b"tokens_per_second", b"recipe_hash", b"small-models"):
        assert text in written


def write_steps(folder, steps):
    log = WandbLog(folder, mode="offline", group="g", name="n", config={}, axes={"loss": "step"})
    for step in steps:
        log.write({"step": step, "loss": 1.0 / step, "text": "x" * 3000})
    log.close()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.93, 1.0])
def test_a_run_that_goes_on_logs_what_its_files_lack_and_nothing_twice(tmp_path, share):
    write_steps(tmp_path, range(1, 16))  # more than one block of the file
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])  # as a kill leaves it
    held = [row["step"] for row in logged(tmp_path)]
    assert held == list(range(1, len(held) + 1)) and (share in (0, 1) or 0 < len(held) < 15)
    write_steps(tmp_path, range(1, 18))
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 18)) and all(row["loss"] == 1 / row["step"] for row in rows)
    assert len({run.run_id for run in logged(tmp_path, "run")}) == 1


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


def leveldb_log(payloads):
    """As W&B's files are: a mark of 7 bytes, then records, split where a block of 32 KiB has no room for them."""
    data = b":W&B" + struct.pack("<HB", 0xBEE1, 0)
    for payload in payloads:
        first = True
        while first or payload:
            room = 32768 - len(data) % 32768
            if room < 7:
                data += bytes(room)
                room = 32768
            part, payload = payload[: room - 7], payload[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not payload]
            data += struct.pack("<IHB", 0, len(part), kind) + part
            first = False
    return data


def test_records_are_read_across_blocks_and_a_cut_one_is_left_out():
    payloads = [b"a" * 10, b"b" * 40_000, b"c" * 100_000, b"d" * 25_000, b"e"]
    data = leveldb_log(payloads)
    assert list(records(data)) == payloads
    assert list(records(data[:-30])) == payloads[:-2], "the last but one is cut as well"
    assert list(records(b"something else" + data)) == []
