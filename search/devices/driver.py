"""How a program is run somewhere: five calls, behind which lie this machine, ssh or adb."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from search.devices.base import DeviceError, Fidelity, Measurement, MeasureRequest, parse_output


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
        finished = driver.run([program, model, *request.arguments()], {}, request.timeout_s)
        if finished.status == 2:
            raise ValueError(f"{driver.name}: {finished.err.strip().removeprefix('error: ')}")
        if finished.status:
            tail = (finished.err or finished.out).strip().splitlines()
            raise DeviceError(f"{driver.name}: pocketforge-run ended with status {finished.status}"
                              f"{': ' + tail[-1][:300] if tail else ''}")
        return parse_output(finished.out, driver.name, driver.fidelity)


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
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise DeviceError(
            f"{command[0]} took longer than {timeout_s:g} s and was stopped; raise the limit or ask for less"
        ) from None
    return Finished(process.returncode, out, err)


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
