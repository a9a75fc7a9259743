"""What comes of one measurement: a status, raw samples, and what is needed to judge them. The wire has it as it is here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from search.devices.base import BadOutput, Fidelity, Measurement, Status, Thermals, parse_output

STATUSES: tuple[Status, ...] = get_args(Status)
FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)
LOG_BYTES = 4096
MAX_SAMPLES = 10_000
SAMPLE_FIELDS = ("ttft_ms", "decode_tok_s")


class AnswerError(ValueError):
    """Not an answer to a measurement."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A measurement's outcome, good or bad."""

    status: Status
    device: str
    fidelity: Fidelity
    reason: str = ""
    """In words, where the status is not ok."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """One a repeat: repeat, warmup (true for those to leave out), ttft_ms, decode_tok_s."""
    measurement: Measurement = field(default_factory=dict)
    """What the program printed."""
    before: Thermals = Thermals()
    after: Thermals = Thermals()
    output_hash: str | None = None
    exit_code: int | None = None
    log: str = ""
    """Its end."""
    started: float | None = None
    """By the device's clock; None where the measurement never began, which then is not the job's fault."""
    ended: float | None = None

    def wire(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "throttled": self.status == "throttled"}

    def counted(self, name: str) -> list[float]:
        """The raw values of one sample field, warm-up left out."""
        return [float(sample[name]) for sample in self.samples if not sample["warmup"] and sample.get(name) is not None]


def parse_answer(found: Any, device: str, fidelity: Fidelity) -> Answer:
    """Check an answer from the wire, which may be anything. Unknown fields are ignored. Raises AnswerError."""
    if not isinstance(found, dict) or found.get("status") not in STATUSES:
        raise AnswerError(f"{device}: answered {str(found)[:80]!r}; expected an object with a status of {', '.join(STATUSES)}")
    if found.get("fidelity", fidelity) != fidelity:
        raise AnswerError(f"{device}: said {fidelity} at first and {str(found['fidelity'])[:20]!r} now; they are never mixed")
    status: Status = found["status"]
    samples = tuple(_sample(entry, device) for entry in _list(found.get("samples", []), MAX_SAMPLES, device))
    measurement = found.get("measurement") or {}
    if not isinstance(measurement, dict):
        raise AnswerError(f"{device}: its measurement is {str(measurement)[:40]!r}; expected an object")
    _check_measurement(measurement, device, fidelity)
    exit_code, output_hash = found.get("exit_code"), found.get("output_hash")
    answer = Answer(
        status=status, device=device, fidelity=fidelity, reason=str(found.get("reason", ""))[:1000], samples=samples,
        measurement={**measurement, "device": device, "fidelity": fidelity} if measurement else {},
        before=_thermals(found.get("before"), device), after=_thermals(found.get("after"), device),
        output_hash=None if output_hash is None else str(output_hash)[:64],
        exit_code=exit_code if isinstance(exit_code, int) else None, log=str(found.get("log", ""))[-LOG_BYTES:],
        started=_time(found.get("started"), device), ended=_time(found.get("ended"), device),
    )  # fmt: skip
    if status == "ok" and fidelity != "emulated" and not answer.counted("ttft_ms"):
        raise AnswerError(f"{device}: says ok and gives no samples; expected one a repeat")
    return answer


def _check_measurement(found: Measurement, device: str, fidelity: Fidelity) -> None:
    """Numbers where results are made of them; an emulated device has left its times out."""
    if found and fidelity != "emulated":
        try:
            parse_output(json.dumps(found), device, fidelity)
        except BadOutput as error:
            raise AnswerError(str(error)) from None
    for name in ("prefill_cpu_seconds", "decode_cpu_seconds", "decode_tokens", "peak_memory_bytes"):
        if found.get(name) is not None and not _number(found[name]):
            raise AnswerError(f"{device}: gave {name}={str(found[name])[:40]!r}; expected a number")


def _list(found: Any, most: int, device: str) -> list[Any]:
    if not isinstance(found, list) or len(found) > most:
        raise AnswerError(f"{device}: gave {str(found)[:40]!r} where a list of at most {most} is expected")
    return found


def _number(found: Any) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)


def _sample(found: Any, device: str) -> dict[str, Any]:
    if not isinstance(found, dict) or not isinstance(found.get("warmup"), bool):
        raise AnswerError(f"{device}: gave the sample {str(found)[:60]!r}; expected an object with warmup and times")
    sample: dict[str, Any] = {"repeat": found.get("repeat"), "warmup": found["warmup"]}
    for name in SAMPLE_FIELDS:
        value = found.get(name)
        if value is not None and not (_number(value) and 0 < value < 1e9):
            raise AnswerError(f"{device}: gave the sample {name}={str(value)[:40]!r}; expected a finite number above 0")
        sample[name] = value
    return sample


def _time(found: Any, device: str) -> float | None:
    if found is not None and not _number(found):
        raise AnswerError(f"{device}: gave the time {str(found)[:40]!r}; expected seconds")
    return found


def _thermals(found: Any, device: str) -> Thermals:
    if not isinstance(found, dict):
        return Thermals()
    clocks = [_list(found.get(name) or [], 4096, device) for name in ("mhz", "limit_mhz")]
    values = [found.get("max_c"), *clocks[0], *clocks[1]]
    if not all(value is None or _number(value) for value in values):
        raise AnswerError(f"{device}: gave a temperature or frequency that is no number")
    return Thermals(found.get("max_c"), tuple(clocks[0]), tuple(clocks[1]))
