"""The runtime's programs, built for this machine and, by `make runtime-aarch64`, for 64-bit Arm."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "kernels" / "lib"
AARCH64 = ROOT / "build" / "cross-aarch64" / "kernels" / "lib"


@functools.cache
def _lacks() -> str:
    """What keeps Arm programs from running here; empty for nothing. Programs older than their sources are built anew."""
    if shutil.which("qemu-aarch64") is None:
        return "no qemu-aarch64; .ci/system-packages installs it"
    if not all((AARCH64 / name).exists() for name in ("pocketforge-check", "pocketforge-run")):
        return f"no programs in {AARCH64.relative_to(ROOT)}; make runtime-aarch64 builds them"
    build = str(ROOT / "build" / "cross-aarch64")
    for command in (["cmake", "--build", build], ["cmake", "--install", build, "--prefix", build]):
        subprocess.run(command, check=True, capture_output=True)
    return ""


def emulator() -> str:
    """qemu-aarch64, or a skipped test that says what lacks."""
    if _lacks():
        pytest.skip(_lacks())
    return "qemu-aarch64"


def run(program: str, *arguments: str, cpu: str | None = None, isa: str = "") -> dict:
    """The JSON that a program prints, here or (with `cpu`) as that Arm CPU. A signal or an error fails the test."""
    path = NATIVE / program if cpu is None else AARCH64 / program
    prefix = [] if cpu is None else [emulator(), "-cpu", cpu]
    done = subprocess.run([*prefix, str(path), *arguments], capture_output=True, text=True, timeout=200,
                          env=os.environ | {"POCKETFORGE_ISA": isa})  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    return json.loads(done.stdout)
