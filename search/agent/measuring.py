"""One measurement on a device that is at hand: wait until it is cool, warm up, time, and say what became of it.

Nothing is dropped here: every repeat's time goes on, warm-up is marked. What to make of them is the farm's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from search.agent.answer import Answer
from search.devices.base import Device, DeviceCrash, DeviceError, HasThermals, Measurement, MeasureRequest, Thermals

CONTENDED = 1.2
"""Wall time over processor time of one thread, above which another program was running: on a busy machine no statistic
of wall times helps (their median spread by half between sessions, processor time by 2 %)."""
THROTTLED = 0.98
GATE_POLL_S = 5.0


@dataclass(frozen=True)
class Gate:
    """How cool a device must be before it is timed. `max_c` None: however warm it is."""

    max_c: float | None = None
    max_wait_s: float = 600.0
    throttle_c: float | None = None
    """Above this after timing, the times are of a throttled device, whatever it says of its clocks."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement as a device is asked for it: `request.repeats` timed ones after `warmup` marked ones."""

    request: MeasureRequest
    warmup: int = 4
    rest_s: float = 0.0
    gate: Gate = Gate()
    expect: str | None = None
    """The hash of the output that is right; another one fails the measurement, however fast it was."""


def measure(
    device: Device, task: Task, clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
) -> Answer:
    """Never raises for what a device does: that is in the answer's status and reason."""
    said: dict[str, Any] = {"device": device.name, "fidelity": device.fidelity}
    try:
        before = _cooled(device, task.gate, clock, sleep)
        if task.gate.max_c is not None and before.max_c is not None and before.max_c > task.gate.max_c:
            reason = f"{before.max_c:g} C after {task.gate.max_wait_s:g} s of waiting; the gate is {task.gate.max_c:g} C"
            return Answer(status="hot", reason=reason, before=before, **said)
    except DeviceError as error:
        return Answer(status="lost", reason=str(error), **said)
    started = clock()
    try:
        request = replace(task.request, repeats=task.request.repeats + task.warmup)
        found = device.measure(request)
        after = _thermals(device)
    except DeviceCrash as error:
        return Answer(status=error.status, reason=str(error), exit_code=error.exit_code, log=error.log, before=before,
                      started=started, ended=clock(), **said)  # fmt: skip
    except DeviceError as error:
        return Answer(status=error.status, reason=str(error), before=before, started=started, ended=clock(), **said)
    except ValueError as error:  # the program refused the model or the request, and would everywhere
        return Answer(status="unsupported", reason=str(error), exit_code=2, before=before, started=started, ended=clock(),
                      **said)  # fmt: skip
    ended = clock()
    if task.rest_s:
        sleep(task.rest_s)
    answer = Answer(status="ok", samples=samples_of(found, task.warmup), measurement=found, before=before, after=after,
                    output_hash=found.get("logits_crc32c"), exit_code=0, started=started, ended=ended, **said)  # fmt: skip
    return judge(answer, task)


def judge(answer: Answer, task: Task) -> Answer:
    """An ok answer, or why it is none: wrong output first, since nothing excuses that."""
    if task.expect is not None and answer.output_hash is not None and answer.output_hash != task.expect:
        reason = f"its output has the checksum {answer.output_hash}, expected {task.expect}: it computed something else"
        return replace(answer, status="bad_output", reason=reason)
    if reason := throttling(answer.before, answer.after, task.gate):
        return replace(answer, status="throttled", reason=reason)
    ratio = contention(answer.measurement)
    if ratio is not None and ratio > CONTENDED:
        reason = f"wall time was {ratio:.2f} times processor time; the limit is {CONTENDED}"
        return replace(answer, status="contended", reason=reason)
    return answer


def samples_of(found: Measurement, warmup: int) -> tuple[dict[str, Any], ...]:
    """One record a repeat from what the program printed; a device that computes its times instead has one."""
    raw = found.get("samples") or {}
    if not isinstance(raw, dict) or not raw.get("prefill_seconds"):
        if found.get("time_to_first_token_ms") is None:
            return ()
        return ({"repeat": 0, "warmup": False, "ttft_ms": found["time_to_first_token_ms"],
                 "decode_tok_s": found["decode_tokens_per_second"]},)  # fmt: skip
    prefill, steps = raw["prefill_seconds"], raw.get("decode_step_seconds") or []
    each = len(steps) // len(prefill)
    decode = [each / sum(steps[i * each : (i + 1) * each]) if each else None for i in range(len(prefill))]
    return tuple({"repeat": i, "warmup": i < warmup, "ttft_ms": 1e3 * seconds, "decode_tok_s": decode[i]}
                 for i, seconds in enumerate(prefill))  # fmt: skip


def contention(found: Measurement) -> float | None:
    """Wall time over processor time of the timed repeats, the worse of prefill and decode; None where it cannot be told.

    Only for one thread: of several, some wait for others without anybody else running.
    """
    raw = found.get("samples") or {}
    if found.get("threads") != 1 or not raw.get("prefill_seconds"):
        return None
    repeats = len(raw["prefill_seconds"])
    pairs = [(sum(raw.get(name) or []) / repeats, found.get(cpu) or 0.0)
             for name, cpu in (("prefill_seconds", "prefill_cpu_seconds"), ("decode_step_seconds", "decode_cpu_seconds"))]
    return max((wall / cpu for wall, cpu in pairs if cpu > 0), default=None)


def throttling(before: Thermals, after: Thermals, gate: Gate) -> str:
    """Why the times are of a throttled device; empty where nothing says so."""
    if gate.throttle_c is not None and after.max_c is not None and after.max_c > gate.throttle_c:
        return f"{after.max_c:g} C after timing; the limit is {gate.throttle_c:g} C"
    fell = [(i, a, b) for i, (b, a) in enumerate(zip(before.limit_mhz, after.limit_mhz, strict=False)) if a < THROTTLED * b]
    if fell:
        core, now, once = fell[0]
        return f"core {core} was held to {now:g} MHz after timing, {once:g} before"
    return ""


def _thermals(device: Device) -> Thermals:
    return device.thermals() if isinstance(device, HasThermals) else Thermals()


def _cooled(device: Device, gate: Gate, clock: Callable[[], float], sleep: Callable[[float], None]) -> Thermals:
    """The temperature once it is below the gate, or after the longest wait."""
    until = clock() + gate.max_wait_s
    while True:
        found = _thermals(device)
        if gate.max_c is None or found.max_c is None or found.max_c <= gate.max_c or clock() >= until:
            return found
        sleep(min(GATE_POLL_S, max(0.01, until - clock())))
