"""A job submitted to a head started as docs/cluster.md says, through Ray Train, on two workers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).parent / "ray")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Head:
    address: str
    """As RAY_ADDRESS has it."""
    jobs: str
    """Where jobs are submitted."""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: the paths of Ray's sockets have a limit of 107 bytes
    environment = {**os.environ, "RAY_TMPDIR": str(folder)}
    port, dashboard = free_port(), free_port()
    start = subprocess.run(
        [RAY, "start", "--head", "--port", str(port), "--dashboard-host", "127.0.0.1",
         "--dashboard-port", str(dashboard), "--num-cpus", "2", "--disable-usage-stats",
         # Their usual ports may still be held by the agent of a head that another test has just left.
         "--dashboard-agent-listen-port", str(free_port()), "--dashboard-agent-grpc-port", str(free_port()),
         "--runtime-env-agent-port", str(free_port()), "--metrics-export-port", str(free_port())],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert start.returncode == 0, start.stderr
    yield Head(address=f"127.0.0.1:{port}", jobs=f"http://127.0.0.1:{dashboard}")
    subprocess.run([RAY, "stop", "--force"], env=environment, capture_output=True, timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def submit(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A head answers before its job agent is up; on a busy machine that takes it a while."""
    for _ in range(12):
        done = _submit_once(head, *arguments)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(5)
    return done


def _submit_once(head: Head, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [RAY, "job", "submit", "--address", head.jobs, "--working-dir", ".", "--", sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_submitted_job_trains_on_two_workers_and_a_cluster_that_is_too_small_is_told(head: Head, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = submit(head, "launch/pretrain.py", "--recipe", "smoke", "--launch.workers", "2", "--output-dir", str(output))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in (output / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    state = json.loads((output / "pretrain" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["world"] == 2

    command = [sys.executable, "launch/pretrain.py", "--recipe", "smoke", "--launch.workers", "4"]
    wrong = subprocess.run([*command, "--output-dir", str(tmp_path / "wrong")], cwd=ROOT, capture_output=True, text=True,
                           timeout=120, env={**os.environ, "RAY_ADDRESS": head.address})  # fmt: skip
    assert wrong.returncode == 2 and "need 4 CPUs, the cluster has 2" in wrong.stderr
