"""An aarch64 machine emulated by qemu: shows that the program runs and what it computes, never how long it takes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.devices.base import DeviceError, Fidelity, Measurement, MeasureRequest
from search.devices.driver import Finished, LocalDriver, ProgramDevice, cross_program, run_command

TIMES = re.compile(r"_per_second$|_ms$|_seconds$|^read_bandwidth|^decode_share|^operations$")


class QemuDriver(LocalDriver):
    """User-mode emulation of one CPU model."""

    fidelity: Fidelity = "emulated"

    def __init__(self, cpu: str = "max") -> None:
        if not re.fullmatch(r"[\w.,+-]+", cpu):
            raise ValueError(f"qemu-aarch64:{cpu}: expected the name of a CPU model, such as max or cortex-a76")
        self.cpu = cpu
        self.name = f"qemu-aarch64:{cpu}"

    def run(self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> Finished:
        if shutil.which("qemu-aarch64") is None:
            raise DeviceError("qemu-aarch64 is not installed; on Debian it is in the package qemu-user")
        return run_command(["qemu-aarch64", "-cpu", self.cpu, *command], environment, timeout_s)

    def program(self) -> str:
        return str(cross_program("aarch64"))


@dataclass(frozen=True)
class EmulatedDevice(ProgramDevice):
    """As a device that runs programs, but its times are taken out: an emulator's mean nothing."""

    def measure(self, request: MeasureRequest) -> Measurement:
        found = super().measure(request)
        timeless = {key: None if TIMES.search(key) else value for key, value in found.items()}
        return {**timeless, "samples": {}, "note": "emulated: computed as on the device, not timed"}
