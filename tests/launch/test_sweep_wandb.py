"""What W&B gets of a search: each trial once, a round's figures, the front; also after a kill, and nothing that stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from launch.sweep_config import load_sweep
from launch.sweep_run import DATABASE
from launch.sweep_wandb import STEPS, SweepWatch
from search.jobs import JobQueue
from search.records import DeviceRecord, Reading
from search.store import Store
from tests.helpers.wandb_rows import logged

SWEEP = load_sweep("smoke_search", {"recipe.tracking.project": "phones"})
ROOT = Path(__file__).resolve().parents[2]


def answer(store, count):
    """`count` more trials of the smoke search's space, measured and told; every fifth one fails."""
    import random

    space, queue, first = SWEEP.make_space(), JobQueue(store), store.num_trials()
    candidates = space.sample(random.Random(first), count)
    store.put_device(DeviceRecord(name="phone", device_class="", fidelity="device"))
    for candidate in candidates:
        store.event("predicted", key=space.key(candidate), ttft_ms=1.0, deviation=0.1)
    store.add_trials([(space.key(c), {"token": i, "candidate": space.flatten(c)}) for i, c in enumerate(candidates, first)])
    for number in range(first, first + count):
        if number % 5 == 4:
            store.finish_trial(number, "failed", reason="worker lost")
        else:
            queue.submit(f"trial/{number}/ttft", {}, trial=number)
            lease = queue.lease("phone", "", 60)
            value = 0.9 + 0.02 * number
            reading = Reading(device="phone", fidelity="device", status="ok", values={"ttft_ms": value}, errors={},
                              samples=[], started=100.0 + number, ended=100.5 + number)  # fmt: skip
            assert queue.finish(lease, "ok", {"ttft_ms": value}, readings=[(reading, "result")])
            results = {"loss": 6.0 - 0.01 * number, "ttft_ms": value, "tokens": 512.0, "score_seconds": 2.0}
            store.finish_trial(number, "ok", results, {"ttft_ms": 0.01})
        store.tell(number)


def opened(folder):
    return Store.open(folder / DATABASE, SWEEP.comparable())


def test_trials_rounds_and_the_front_are_logged(tmp_path):
    with opened(tmp_path) as store, SweepWatch(SWEEP, tmp_path, store.path):
        answer(store, 5)
    rows = logged(tmp_path)
    assert [row["_step"] for row in rows] == [*(STEPS * n for n in range(1, 6)), STEPS * 5 + 1]
    first, last = rows[0], rows[4]
    assert first["trial/number"] == 0 and first["trial/state"] == "ok" and first["trial/device"] == "phone"
    assert first["trial/fidelity"] == "device" and first["trial/tokens"] == 512 and first["trial/seconds"] == 2.5
    assert first["trial/loss"] == 6.0 and first["trial/noise/ttft_ms"] == 0.01 and first["trial/predicted/ttft_ms"] == 1.0
    assert first["trial/off_percent/ttft_ms"] == pytest.approx(11.11, abs=0.01)
    assert first["config/num_layers"] in (2, 3, 4) and set(first["config/attention"]) <= set("Fw·")
    assert last["trial/state"] == "failed" and last["trial/reason"] == "worker lost" and "trial/loss" not in last
    rounds = {row["round/number"]: row for row in rows if "round/number" in row}
    assert sorted(rounds) == [1, 2, 3] and SWEEP.batch == 2 and "round/number" not in rows[0]
    assert rounds[3]["round/trials"] == 5 and rounds[3]["round/failures/failed"] == 1 and rounds[3]["round/front_size"] == 4
    assert rounds[3]["round/utilisation/phone"] == pytest.approx(4 * 0.5 / 3.5)
    assert rounds[1]["round/hypervolume"] < rounds[2]["round/hypervolume"] == pytest.approx(rounds[3]["round/hypervolume"])
    front = rows[-1]
    assert front["front/nrows"] == 4 and front["front_plot/format"] == "png" and (tmp_path / "wandb" / "front.png").is_file()
    (run,) = logged(tmp_path, "run")
    assert run.project == "phones" and run.display_name == f"smoke_search-{tmp_path.name}"


def test_going_on_logs_under_the_same_run_only_what_is_new(tmp_path):
    for count in (3, 0, 2):
        with opened(tmp_path) as store, SweepWatch(SWEEP, tmp_path, store.path):
            answer(store, count)
    rows = logged(tmp_path)
    assert [row["trial/number"] for row in rows if "trial/number" in row] == [0, 1, 2, 3, 4]
    assert sum("front/nrows" in row for row in rows) == 2, "after three trials and after five, not again after nothing"
    assert len({run.run_id for run in logged(tmp_path, "run")}) == 1


KILLED = """
import sys, time
from pathlib import Path
import tests.launch.test_sweep_wandb as test
folder = Path(sys.argv[1])
with test.opened(folder) as store, test.SweepWatch(test.SWEEP, folder, store.path):
    test.answer(store, 4)
    print("told", flush=True)
    time.sleep(600)
"""


def test_after_a_kill_nothing_is_missing_and_nothing_is_there_twice(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "told\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with opened(tmp_path) as store, SweepWatch(SWEEP, tmp_path, store.path):
        answer(store, 2)
    numbers = [row["trial/number"] for row in logged(tmp_path) if "trial/number" in row]
    assert sorted(numbers) == [0, 1, 2, 3, 4, 5]


def test_a_mode_of_disabled_starts_nothing(tmp_path):
    sweep = load_sweep("smoke_search", {"recipe.tracking.wandb": "disabled"})
    with opened(tmp_path) as store, SweepWatch(sweep, tmp_path, store.path):
        answer(store, 2)
    assert not (tmp_path / "wandb").exists()


def test_what_cannot_be_read_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("launch.sweep_wandb.measured_by", lambda store: 1 / 0)
    with opened(tmp_path) as store, SweepWatch(SWEEP, tmp_path, store.path):
        answer(store, 2)
    warnings = [record.getMessage() for record in caplog.records if record.name == "launch.sweep_wandb"]
    assert len(warnings) == 1 and "division by zero" in warnings[0] and "the search goes on" in warnings[0]
    with opened(tmp_path) as store:
        assert len(store.told()) == 2
