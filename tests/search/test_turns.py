"""Computing and measuring on one machine by turns, among processes that may be killed."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import torch

from search.turns import Turns

COMPUTES = """
import sys, time
from pathlib import Path
from search.turns import Turns
turns = Turns(Path(sys.argv[1]))
with turns.computing():
    print("computing", flush=True)
    while True:
        time.sleep(0.01)
        turns.give()
        print(time.monotonic(), flush=True)
"""


def test_whoever_computes_stops_at_its_next_step_while_something_is_measured(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", COMPUTES, str(tmp_path)], stdout=subprocess.PIPE, text=True)
               for _ in range(2)]  # fmt: skip
    try:
        for worker in workers:
            assert worker.stdout.readline() == "computing\n"
        time.sleep(0.2)
        with Turns(tmp_path).measuring():
            began = time.monotonic()
            time.sleep(0.5)
            ended = time.monotonic()
        time.sleep(0.3)
    finally:
        for worker in workers:
            worker.kill()
    for worker in workers:
        steps = [float(line) for line in worker.stdout.read().split()]
        assert not [step for step in steps if began + 0.05 < step < ended], "no step while it was measured"
        assert [step for step in steps if step < began] and [step for step in steps if step > ended], "but before and after"


def test_a_measurement_does_not_wait_for_a_moment_when_nobody_computes(tmp_path):
    """Eight that compute in steps of a twentieth of a second leave no such moment."""
    workers = [subprocess.Popen([sys.executable, "-c", COMPUTES.replace("0.01", "0.05"), str(tmp_path)], stdout=subprocess.PIPE,
                                text=True) for _ in range(8)]  # fmt: skip
    try:
        for worker in workers:
            assert worker.stdout.readline() == "computing\n"
        waited = []
        for _ in range(5):
            began = time.monotonic()
            with Turns(tmp_path).measuring():
                waited.append(time.monotonic() - began)
    finally:
        for worker in workers:
            worker.kill()
    assert max(waited) < 2.0


def test_a_killed_process_holds_nothing(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", COMPUTES.replace("turns.give()", "pass"), str(tmp_path)],
                              stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert worker.stdout.readline() == "computing\n"
    measured = threading.Event()

    def measure():
        with Turns(tmp_path).measuring():
            measured.set()

    thread = threading.Thread(target=measure)
    thread.start()
    assert not measured.wait(0.3), "it gives no turn"
    worker.kill()
    assert measured.wait(5.0)
    thread.join()


def test_a_training_gives_way_at_each_step(tmp_path, monkeypatch):
    from launch import sweep_score
    from launch.sweep_config import load_sweep, save_sweep

    sweep = load_sweep("quickstart_search", {})
    save_sweep(sweep, tmp_path / "sweep.toml")
    turns = sweep_score._turns(str(tmp_path / "sweep.toml"))
    asked = []
    monkeypatch.setattr(turns, "give", lambda: asked.append(1))
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(3):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert len(asked) == 3
    elsewhere = load_sweep("quickstart_search", {"device.names": '["model:oneplus_12"]'})
    assert sweep_score.turns_of(elsewhere, tmp_path) is None
