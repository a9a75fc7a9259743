"""The project's commands as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    dropped = {"POCKETFORGE_DATA", "RAY_ADDRESS"}
    return {**{key: value for key, value in os.environ.items() if key not in dropped}, "OMP_NUM_THREADS": "1"}


def launch(name: str, *arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments], env=environment(),
                          cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    return done


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`launch/pretrain.py` as two processes, without Ray."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "launch" / "pretrain.py"), *arguments]  # fmt: skip
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
