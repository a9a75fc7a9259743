"""How a program is run somewhere: five calls, behind which lie this machine, ssh or adb."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from search.devices.base import (
    DeviceCrash,
    DeviceError,
    DeviceTimeout,
    Fidelity,
    Measurement,
    MeasureRequest,
    Thermals,
    parse_output,
)


@dataclass(frozen=True)
class Finished:
    """A program that ended."""

    status: int
    out: str
    err: str


class Driver(Protocol):
    """Files and programs of one device."""

    name: str
    fidelity: Fidelity

    def put(self, local: Path) -> str:
        """Make a local file available; returns its path there. Files are named by content and sent once."""
        ...

    def run(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Finished: ...

    def read(self, remote: str) -> bytes: ...

    def remove(self, remote: str) -> None: ...

    def alive(self) -> bool: ...

    def lost(self, finished: Finished) -> bool:
        """Whether a failed run failed because the device went away."""
        ...

    def program(self) -> str:
        """The path of `pocketforge-run` for this device, put there where needed."""
        ...


@dataclass(frozen=True)
class ProgramDevice:
    """A device that measures by running `pocketforge-run` through a driver."""

    driver: Driver

    @property
    def name(self) -> str:
        return self.driver.name

    @property
    def fidelity(self) -> Fidelity:
        return self.driver.fidelity

    def measure(self, request: MeasureRequest) -> Measurement:
        driver = self.driver
        program, model = driver.program(), driver.put(request.model)
        pin = ["taskset", "-c", ",".join(map(str, request.cores))] if request.cores else []
        finished = driver.run([*pin, program, model, *request.arguments()], {}, request.timeout_s)
        if finished.status == 2:
            raise ValueError(f"{driver.name}: {finished.err.strip().removeprefix('error: ')}")
        if finished.status:
            self._fail(finished, request)
        return parse_output(finished.out, driver.name, driver.fidelity)

    def _fail(self, finished: Finished, request: MeasureRequest) -> NoReturn:
        log = finished.err or finished.out
        last = (log.strip().splitlines() or [""])[-1][:300]
        if self.driver.lost(finished):
            raise DeviceError(f"{self.name}: {last or 'the connection ended'}")
        if finished.status == 124 and self.fidelity == "device":  # `timeout` there
            raise DeviceTimeout(f"{self.name}: pocketforge-run took longer than {request.timeout_s:g} s and was stopped")
        raise DeviceCrash(f"{self.name}: pocketforge-run ended with status {finished.status}{': ' + last if last else ''}",
                          finished.status, log[-4096:])  # fmt: skip

    def thermals(self) -> Thermals:
        """Raises DeviceError where the device is gone."""
        if self.fidelity == "emulated":
            return Thermals()
        return parse_thermals(self.driver.run(["sh", "-c", READ_THERMALS], {}, 30.0).out)


READ_THERMALS = """dumpsys thermalservice 2>/dev/null | sed -n '/Current temp/,/Current cool/p' | grep "Temperature{"
cd /sys/class/thermal 2>/dev/null && for z in thermal_zone*; do
echo "zone $(cat $z/type 2>/dev/null) $(cat $z/temp 2>/dev/null)"; done
for c in /sys/devices/system/cpu/cpu[0-9]*/cpufreq; do
echo "core $(cat $c/scaling_cur_freq 2>/dev/null) $(cat $c/scaling_max_freq 2>/dev/null)"; done"""


ANDROID_CPU = "0"
"""mType of a processor in Android's thermal service (1 GPU, 2 battery, 3 skin ...)."""


def parse_thermals(text: str) -> Thermals:
    """From what READ_THERMALS prints; lines that make no sense are left out (a sensor may be switched off).

    Where Android's own service speaks it is believed instead of the kernel's files: those may be closed to a shell.
    """
    said = re.findall(r"Temperature\{mValue=(\d{1,3}(?:\.\d+)?), mType=(\d+), mName=([^,]+)", text)
    zones = [("cpu" if kind == ANDROID_CPU else name.lower(), float(value)) for value, kind, name in said]
    if not zones:
        zones = [(kind, int(value) / 1000) for kind, value in re.findall(r"^zone (\S+) (\d{4,6})$", text, re.MULTILINE)]
    hot = [celsius for _, celsius in zones if celsius < 150]
    cpu = [celsius for kind, celsius in zones if celsius < 150 and re.search(r"cpu|soc|tsens|x86_pkg|coretemp", kind)]
    cores = re.findall(r"^core (\d+) (\d+)$", text, re.MULTILINE)
    return Thermals(max(cpu or hot, default=None), tuple(int(now) / 1000 for now, _ in cores),
                    tuple(int(most) / 1000 for _, most in cores))  # fmt: skip


STOP: ContextVar[threading.Event | None] = ContextVar("STOP", default=None)
"""Set in a measurement's thread by who may want to end it early; checked while a program runs."""
POLL_S = 0.5


def run_command(
    command: Sequence[str], environment: Mapping[str, str], timeout_s: float, stdin: Path | None = None
) -> Finished:
    """Run a local program in its own process group; all of it is killed at the limit. Raises DeviceError."""
    source = stdin.open("rb") if stdin is not None else subprocess.DEVNULL
    try:
        process = subprocess.Popen(command, stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   errors="replace", start_new_session=True, env={**os.environ, **environment})
    except OSError as error:
        raise DeviceError(f"{command[0]} cannot be started ({error}); install it, or put it on the path") from None
    finally:
        if stdin is not None:
            source.close()  # type: ignore[union-attr]
    stop, deadline = STOP.get(), time.monotonic() + timeout_s
    try:
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                out, err = process.communicate(timeout=left if stop is None else min(left, POLL_S))
                return Finished(process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if stop is not None and stop.is_set():
                    raise DeviceError(f"{command[0]} was stopped before its end, as was asked") from None
                if time.monotonic() >= deadline:
                    raise DeviceTimeout(
                        f"{command[0]} took longer than {timeout_s:g} s and was stopped; raise the limit or ask for less"
                    ) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def content_name(path: Path) -> str:
    """A file's name by its content, so that what lies on a device already is not sent again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


class LocalDriver:
    """This machine."""

    name = "local"
    fidelity: Fidelity = "host"

    def put(self, local: Path) -> str:
        return str(local)

    def run(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Finished:
        return run_command(command, environment, timeout_s)

    def read(self, remote: str) -> bytes:
        return Path(remote).read_bytes()

    def remove(self, remote: str) -> None:
        """Nothing was put anywhere."""

    def alive(self) -> bool:
        return True

    def lost(self, finished: Finished) -> bool:
        return False

    def program(self) -> str:
        from kernels.runtime import executable_path

        path = executable_path()
        if not path.is_file() or shutil.which(str(path)) is None:
            raise DeviceError(f"{path} is not there; build the runtime with `make setup`")
        return str(path)


def cross_program(machine: str) -> Path:
    """`pocketforge-run` built for another kind of machine. Raises DeviceError."""
    path = Path(__file__).resolve().parent.parent.parent / "build" / f"runtime-{machine}" / "pocketforge-run"
    if not path.is_file():
        raise DeviceError(f"there is no pocketforge-run for {machine} ({path}); build it with `make runtime-{machine}`")
    return path
