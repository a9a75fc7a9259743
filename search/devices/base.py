"""What is asked of a device, and what it answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Fidelity = Literal["device", "host", "emulated", "analytic"]
"""device: a phone or board; host: this machine; emulated: instructions run, times mean nothing; analytic: a model of a
device. Numbers of different fidelity are never compared."""


class DeviceError(RuntimeError):
    """The device is not there, or could not run the model."""


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

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "decode_tokens", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def arguments(self) -> list[str]:
        """Of `pocketforge-run`, without the model."""
        return ["--prompt-tokens", str(self.prompt_tokens), "--decode-tokens", str(self.decode_tokens), "--threads",
                str(self.threads), "--repeats", str(self.repeats), "--kv", self.kv]  # fmt: skip


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
        raise DeviceError(f"{device}: printed no JSON but {text[-200:]!r}; is that pocketforge-run?") from None
    if not isinstance(found, dict) or (missing := [key for key in REQUIRED if key not in found]):
        raise DeviceError(f"{device}: its answer lacks {missing[0] if isinstance(found, dict) else 'an object'}; update the "
                          "program there")
    return {**found, "device": device, "fidelity": fidelity}
