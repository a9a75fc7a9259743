"""A worker of a Ray run that is killed changes nothing about the run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.commands import ROOT, environment, rows, torchrun


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_killed_in_mid_run_is_restarted_and_the_losses_are_the_same(tmp_path: Path) -> None:
    """Two Ray workers; rank 1 is killed with SIGKILL; Ray Train restarts the group, which resumes from a checkpoint.

    The undisturbed run is torchrun's: the same two processes without Ray's start.
    """
    options = ["--recipe", "smoke", "--launch.workers", "2", "--train.steps", "60", "--checkpoint.every", "10",
               "--train.held_out", "[]", "--tracking.wandb", "disabled"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plain = torchrun(*options, "--output-dir", str(whole))
    assert plain.returncode == 0, plain.stderr
    process = subprocess.Popen([sys.executable, str(ROOT / "launch" / "pretrain.py"), *options, "--output-dir", str(killed)],
                               env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: any((killed / "pretrain" / "checkpoints").glob("step-*/commit.json")), process)
        victims = [child for child in psutil.Process(process.pid).children(recursive=True)
                   if "RayTrainWorker" in " ".join(child.cmdline() or [""])]
        assert victims, "no Ray Train worker found to kill"
        victims[-1].send_signal(signal.SIGKILL)
        assert process.wait(timeout=280) == 0, process.stderr.read() if process.stderr else ""
    finally:
        process.kill()
    assert [(row["step"], row["loss"]) for row in rows(killed / "pretrain")] == [
        (row["step"], row["loss"]) for row in rows(whole / "pretrain")
    ]


def _wait_for(condition, process: subprocess.Popen[str], seconds: float = 240) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be disturbed"
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.02)
