"""What is asked of a device, and what it answers."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

Fidelity = Literal["device", "host", "emulated", "analytic"]
"""device: a phone or board; host: this machine; emulated: instructions run, times mean nothing; analytic: a model of a
device. Numbers of different fidelity are never compared."""


MOST = 1_000_000
"""Of tokens, threads and repeats in one measurement."""

Status = Literal["ok", "hot", "contended", "throttled", "timeout", "crashed", "oom", "bad_output", "lost", "unsupported"]
"""How a measurement ended. hot: too warm to begin; contended: another program took the processor; throttled: the device
slowed itself down meanwhile; bad_output: it computed something else; lost: no answer; unsupported: it cannot be asked that."""


class DeviceError(RuntimeError):
    """The device is not there, or could not run the model."""

    status: Status = "lost"
    began: float | None = None
    """When the measurement that failed had begun, where that is known: only then does the try count."""


class DeviceTimeout(DeviceError):
    """It took longer than it was given."""

    status: Status = "timeout"


class DeviceCrash(DeviceError):
    """The program there failed: the model's fault more likely than the device's."""

    def __init__(self, message: str, exit_code: int, log: str = "") -> None:
        super().__init__(message)
        self.exit_code, self.log = exit_code, log
        killed = exit_code in (-9, 137)  # by the kernel, as a rule, which takes the largest when memory runs out
        self.status = "oom" if killed or re.search(r"no memory|bad_alloc|[Oo]ut of memory", log) else "crashed"


class BadOutput(DeviceError):
    """What it printed or computed is wrong."""

    status: Status = "bad_output"


@dataclass(frozen=True)
class Thermals:
    """What can be read of a device's temperature and clocks; empty where it tells nothing."""

    max_c: float | None = None
    """The hottest processor sensor, in degrees Celsius; of all sensors where none is named so."""
    mhz: tuple[float, ...] = ()
    """Of each core, now."""
    limit_mhz: tuple[float, ...] = ()
    """What each core may reach now: a device that throttles lowers it."""


@runtime_checkable
class HasThermals(Protocol):
    """A device that tells its temperature."""

    def thermals(self) -> Thermals: ...


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """One measurement of a packed file."""

    model: Path
    prompt_tokens: int = 128
    decode_tokens: int = 32
    threads: int = 1
    repeats: int = 5
    kv: Literal["f32", "f16", "int8"] = "f16"
    timeout_s: float = 600.0
    bandwidth: bool = True
    """Measure the read bandwidth too, for decode's share of it: a third of a second more."""
    cores: tuple[int, ...] = ()
    """Run on these alone, where the device has `taskset`."""

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "threads", "repeats"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(f"{name}={getattr(self, name)}; expected 1 to {MOST}")

    def arguments(self) -> list[str]:
        """Of `pocketforge-run`, without the model."""
        return ["--prompt-tokens", str(self.prompt_tokens), "--decode-tokens", str(self.decode_tokens), "--threads",
                str(self.threads), "--repeats", str(self.repeats), "--kv", self.kv,
                *([] if self.bandwidth else ["--bandwidth-mib", "0"])]  # fmt: skip


Measurement = dict[str, Any]
"""measurements.json: `prefill_tokens_per_second`, `decode_tokens_per_second`, `time_to_first_token_ms`,
`peak_memory_bytes`, `weight_bytes`, `threads`, `isa`, `device`, `fidelity`, `samples` (raw, per repeat), and what else
the program printed. Times are null where the fidelity is `emulated`."""

REQUIRED = ("prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token_ms", "peak_memory_bytes",
            "weight_bytes", "threads", "isa", "samples")  # fmt: skip


class Device(Protocol):
    """Something that runs packed models."""

    @property
    def name(self) -> str: ...

    @property
    def fidelity(self) -> Fidelity: ...

    def measure(self, request: MeasureRequest) -> Measurement:
        """Raises DeviceError where the device fails, ValueError where the model or request is refused."""
        ...


def parse_output(text: str, device: str, fidelity: Fidelity) -> Measurement:
    """The program's JSON, checked: a device's answer is untrusted. Raises DeviceError."""
    try:
        found = json.loads(text)
    except ValueError:
        raise BadOutput(f"{device}: printed no JSON but {text[-200:]!r}; is that pocketforge-run?") from None
    if not isinstance(found, dict) or (missing := [key for key in REQUIRED if key not in found]):
        raise BadOutput(f"{device}: its answer lacks {missing[0] if isinstance(found, dict) else 'an object'}; update the "
                        "program there")
    times = found.get("operations", {})
    numbers = {key: found[key] for key in REQUIRED if key not in ("isa", "samples")}
    if isinstance(times, dict) and all(isinstance(part, dict) for part in times.values()):
        numbers |= {f"operations.{phase}.{name}": value for phase, part in times.items() for name, value in part.items()}
    else:
        raise BadOutput(f"{device}: its operations are {str(times)[:60]!r}; update the program there")
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise BadOutput(f"{device}: its {key} is {str(value)[:60]!r}, no number; update the program there")
    return {**found, "device": device, "fidelity": fidelity}
