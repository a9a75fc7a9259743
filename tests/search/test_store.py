"""The sweep's database: one writer, another sweep's file, restarts, and kill -9 in the middle of it."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from search.jobs import JobQueue, violations
from search.records import DeviceRecord, Reading
from search.schema import MIGRATIONS
from search.store import Store, StoreError

SPEC = {"space": {"layers": [2, 4]}, "seed": 0}
READING = Reading(device="a", fidelity="host", status="ok", values={"ttft_ms": 1.0}, errors={}, samples=[1.0], ended=5.0)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    with Store.open(tmp_path / "s.sqlite", SPEC, clock) as store:
        yield store


def test_what_is_written_is_there_after_a_restart(tmp_path):
    with Store.open(tmp_path / "s.sqlite", SPEC) as store:
        trials = store.add_trials([("a", {"layers": 2}), ("b", {"layers": 4}), ("a", {"layers": 2})], snapshot='{"asked": 3}')
        assert [trial.duplicate_of for trial in trials] == [None, None, 0]
        assert store.finish_trial(0, "ok", {"loss": 1.5}, {"loss": 0.1}) and not store.finish_trial(0, "failed", reason="late")
        assert store.settle_duplicates() == 1
        assert store.finish_trial(1, "infeasible", reason="out of memory")
        assert [store.tell(number, f'{{"told": {number}}}') for number in (1, 0)] == [0, 1]
        store.phase = "pareto"
        store.put_device(DeviceRecord(name="phone", device_class="phone", fidelity="device", failures=2))
    with Store.open(tmp_path / "s.sqlite", SPEC) as store:
        assert [trial.state for trial in store.trials()] == ["ok", "infeasible", "ok"]
        assert store.trial(2).results == {"loss": 1.5} and store.trial(0).noise == {"loss": 0.1}
        assert [trial.number for trial in store.told()] == [1, 0]
        assert store.phase == "pareto" and store.snapshot() == '{"told": 0}' and store.spec == SPEC
        assert store.device(DeviceRecord(name="phone", device_class="phone", fidelity="device")).failures == 2
        with pytest.raises(StoreError, match="was of fidelity device"):
            store.device(DeviceRecord(name="phone", device_class="phone", fidelity="emulated"))


def test_failures_never_become_numbers(store):
    store.add_trials([("a", {})])
    for state, results in (("infeasible", {"loss": 9.9}), ("ok", None), ("running", None)):
        with pytest.raises(ValueError, match="only ok has results"):
            store.finish_trial(0, state, results)
    with pytest.raises(ValueError, match="told once"):
        store.tell(0)


def test_an_amended_trial_keeps_its_end_and_the_old_numbers(store):
    store.add_trials([("a", {})])
    store.finish_trial(0, "ok", {"loss": 1.0})
    store.amend_trial(0, {"loss": 2.0}, {})
    assert store.trial(0).results == {"loss": 2.0} and store.events("amended")[0].detail["before"] == {"loss": 1.0}


def test_a_second_writer_is_refused_by_name_and_readers_are_free(store):
    with pytest.raises(StoreError, match=f"is written by process {os.getpid()} on .*readers are free"):
        Store.open(store.path, SPEC)
    store.add_trials([("a", {})])
    with Store.read(store.path) as reader:
        assert len(reader.trials()) == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.add_trials([("b", {})])


def test_another_sweeps_database_is_refused_with_the_setting_that_differs(tmp_path):
    Store.open(tmp_path / "s.sqlite", SPEC).close()
    with pytest.raises(StoreError, match="another sweep .seed is 0 there and 1 here"):
        Store.open(tmp_path / "s.sqlite", {**SPEC, "seed": 1})
    Store.open(tmp_path / "s.sqlite", SPEC).close()  # the refusal gave the lock back
    deep = {"goal": {"loss": 3.0, "limits": {"ttft_ms": 4.0}}}
    Store.open(tmp_path / "deep.sqlite", deep).close()
    with pytest.raises(StoreError, match="goal.limits.ttft_ms is 4.0 there and 5.0 here"):
        Store.open(tmp_path / "deep.sqlite", {"goal": {"loss": 3.0, "limits": {"ttft_ms": 5.0}}})


@pytest.mark.parametrize("kind", ["nonsense", "other program", "newer", "truncated"])
def test_a_file_that_is_no_database_of_ours_is_refused_and_left_alone(tmp_path, kind):
    path = tmp_path / "s.sqlite"
    if kind == "nonsense":
        path.write_bytes(b"not a database at all" * 100)
    elif kind == "other program":
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE notes (text)")
    else:
        Store.open(path, SPEC).close()
        if kind == "newer":
            with sqlite3.connect(path) as connection:
                connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        else:
            path.write_bytes(path.read_bytes()[:5000])
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"not a readable database|another program|update the program"):
        Store.open(path, SPEC)
    assert path.read_bytes() == before
    with pytest.raises(StoreError, match="no such database"):
        Store.read(tmp_path / "absent.sqlite")


def test_a_transaction_is_all_or_nothing_also_inside_another(store):
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.add_trials([("a", {})])
        _ = 1 / 0
    assert store.trials() == []
    store.add_trials([("a", {})])
    assert len(store.trials()) == 1


def test_artefacts_are_found_by_content_until_their_file_changes(store, tmp_path):
    file = tmp_path / "model.pocket"
    file.write_bytes(b"weights")
    made = store.put_artefact(file, "packed", trial=3)
    assert store.artefact(sha256=made.sha256) == store.artefact(kind="packed", trial=3) == made
    assert store.artefact(kind="packed", trial=4) is None
    file.write_bytes(b"half")
    assert store.artefact(sha256=made.sha256) is None


def test_a_late_answer_is_an_event_and_never_a_result(store, clock):
    queue = JobQueue(store)
    job = queue.submit("trial/0/ttft", {"n": 1})
    assert queue.submit("trial/0/ttft", {"n": 2}) == job and queue.job(job).payload == {"n": 1}
    slow = queue.lease("a", "", 10.0)
    assert queue.lease("b", "", 10.0) is None and queue.renew(slow, 20.0)
    clock.now += 19.0
    assert queue.expire(3) == []
    clock.now += 2.0
    assert [job.name for job in queue.expire(3)] == ["trial/0/ttft"] and not queue.renew(slow, 10.0)
    assert queue.lease("a", "", 10.0, others={"b"}) is None, "it failed here and there is another"
    fast = queue.lease("b", "", 10.0)
    assert fast.fence == slow.fence + 1 and fast.job.attempts == 1
    assert not queue.finish(slow, "ok", {"ttft_ms": 666.0}, readings=[(READING, "result")])
    assert queue.job(job).state == "running" and queue.readings(job) == []
    assert queue.finish(fast, "ok", {"ttft_ms": 1.0}, readings=[(replace(READING, device="b"), "result")])
    assert not queue.finish(slow, "failed", reason="very late") and not queue.put_back(slow, "hot", counts=False)
    assert queue.job(job).results == {"ttft_ms": 1.0} and [reading.device for reading in queue.readings(job)] == ["b"]
    late = store.events("late_answer")
    assert len(late) == 3 and late[0].detail["results"] == {"ttft_ms": 666.0} and violations(queue) == []


def test_three_attempts_and_no_more(store, clock):
    queue = JobQueue(store)
    job = queue.submit("x", {})
    for _ in range(3):
        assert queue.lease("a", "", 1.0) is not None
        clock.now += 2.0
        queue.expire(3)
    assert queue.job(job).state == "failed" and "3 times" in queue.job(job).reason and queue.lease("a", "", 1.0) is None


def test_what_a_stopped_service_left_running_goes_back_uncounted(store, clock):
    queue = JobQueue(store)
    old, new = queue.submit("old", {}), queue.submit("new", {})
    queue.lease("a", "", 5.0)
    queue.lease("a", "", 500.0)
    clock.now += 10.0
    assert queue.recover(all_leases=False) == 1 and queue.job(new).state == "running"
    assert queue.recover() == 1
    assert [(queue.job(job).state, queue.job(job).attempts) for job in (old, new)] == [("waiting", 0)] * 2


def test_drifted_jobs_are_measured_again_and_the_newest_counts(store):
    queue = JobQueue(store)
    job = queue.submit("x", {"n": 1}, trial=None)
    queue.finish(queue.lease("a", "", 1.0), "ok", {"ttft_ms": 5.0}, readings=[(READING, "result")])
    assert queue.replace_drifted("a", since=6.0) == [] and queue.replace_drifted("b", since=0.0) == []
    (again,) = queue.replace_drifted("a", since=4.0)
    assert queue.newest(job).id == again and queue.job(again).payload == {"n": 1}
    assert queue.replace_drifted("a", since=4.0) == []
    queue.finish(queue.lease("a", "", 1.0), "ok", {"ttft_ms": 4.0}, readings=[(READING, "result")])
    assert queue.newest(job).results == {"ttft_ms": 4.0} and violations(queue) == []


def test_violations_are_seen(store):
    queue = JobQueue(store)
    store.add_trials([("a", {})])
    queue.submit("open", {}, trial=0)
    store.finish_trial(0, "failed", reason="x")
    queue.submit("ok without a measurement", {}, device_class="p")
    queue.finish(queue.lease("a", "p", 1.0), "ok", {"x": 1.0})
    for fidelity in ("host", "emulated"):
        queue.submit(fidelity, {}, device_class="q")
        queue.finish(queue.lease("a", "q", 1.0), "ok", {"x": 1.0}, readings=[(replace(READING, fidelity=fidelity), "result")])
    text = "\n".join(violations(queue))
    assert all(words in text for words in ("its job open has not", "0 accepted measurements", "2 fidelities"))


WRITER = """
import random, sys
from search.jobs import JobQueue
from search.records import Reading
from search.store import Store
draw = random.Random(int(sys.argv[2]))
store = Store.open(sys.argv[1], {"seed": 0})
queue = JobQueue(store)
queue.recover()
print("up", flush=True)
reading = Reading(device="a", fidelity="host", status="ok", values={"t": 1.0}, errors={}, samples=[1.0] * 50)
while True:
    with store.transaction():
        trial = store.add_trials([("k", {})], snapshot="{}")[0].number
        queue.submit(f"trial/{trial}", {}, trial=trial)
    lease = queue.lease("a", "", 60.0)
    with store.transaction():
        queue.finish(lease, "ok", {"t": 1.0}, readings=[(reading, "result")])
        store.finish_trial(lease.job.trial, "ok", {"t": 1.0})
"""


def test_kill_9_at_any_moment_leaves_a_sound_database(tmp_path):
    path, draw, seen = tmp_path / "s.sqlite", random.Random(0), 0
    for turn in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(turn)], stdout=subprocess.PIPE,
                                   cwd=Path(__file__).resolve().parents[2])  # fmt: skip
        assert process.stdout.readline() == b"up\n"
        time.sleep(draw.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Store.open(path, {"seed": 0}) as store:
            queue = JobQueue(store)
            trials, jobs = store.trials(), queue.jobs()
            assert violations(queue) == [] and len(trials) == len(jobs) > seen, "each trial came with its job"
            assert sum(job.state == "running" for job in jobs) <= 1
            assert [trial.state == "ok" for trial in trials] == [job.state == "ok" for job in jobs]
            seen = len(trials)


CLOSES = """
import sqlite3, sys, threading, time
from pathlib import Path
from search.store import Store

def use():
    try:
        while True:
            with store.transaction():
                store.event("x", name="y" * 2000)
            store.rows("SELECT * FROM events")
    except sqlite3.ProgrammingError as error:
        said.append(str(error))

said = []
for i in range(20):
    store = Store.open(Path(sys.argv[1]) / f"{i}.sqlite", {})
    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    store.close()
    for thread in threads:
        thread.join()
print(len(said), set(said))
"""


def test_closing_waits_for_what_other_threads_are_in_the_middle_of(tmp_path):
    """SQLite's library crashes the process where a connection is closed under a statement of another thread."""
    done = subprocess.run([sys.executable, "-c", CLOSES, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    assert done.stdout == "80 {'Cannot operate on a closed database.'}\n"
