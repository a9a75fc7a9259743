"""A farm's members, and how one of them measures: repeats until the median is known well enough, or what went wrong."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from search.agent.answer import Answer, AnswerError, parse_answer
from search.agent.measuring import Gate, Task, measure
from search.devices.base import Device, DeviceError, Fidelity, MeasureRequest
from search.records import Reading
from search.statistics import half_width, median, outliers, standard_error


@runtime_checkable
class Remote(Protocol):
    """A device that is measured elsewhere, by an agent or a Ray actor, and gives whole answers."""

    def run(self, task: Task, job: str, fence: int, lease_s: float) -> Answer: ...

    def heartbeat(self, job: str) -> bool:
        """Whether it is at that job now."""
        ...


log = logging.getLogger(__name__)


class Clock:
    """Time, so that tests can let hours pass at once."""

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The farm's rules; the defaults are for phones and minutes-long measurements."""

    max_attempts: int = 3
    max_postponed: int = 100
    """Returns to the queue that are nobody's fault (hot, contended), after which a job fails all the same."""
    lease_factor: float = 2.0
    """A lease in time limits of the job, before a heartbeat renews it."""
    heartbeat_s: float = 10.0
    retry_s: float = 5.0
    """Before a job that found its device hot or busy is tried again."""
    warmup: int = 4
    min_repeats: int = 5
    max_repeats: int = 30
    half_width: float = 0.02
    """Enough repeats: half the 95 % interval of the median is a smaller share of it than this."""
    processor_time: bool = False
    """For a computer that others use too: results are `cpu_ttft_ms` and `cpu_decode_tok_s`, processor time of one thread,
    and contention is no failure. Wall times are then among the raw repeats alone. The mean of a batch is one value of it;
    three batches at least."""
    outlier_mad: float = 5.0
    agreement: float = 0.05
    """How far a confirmation may be off."""
    sentinel_jobs: int = 20
    sentinel_s: float = 1800.0
    drift: float = 0.05
    cool_s: float = 120.0
    failures_in_row: int = 3
    reconnects: int = 5
    reconnect_s: float = 2.0
    reboot: bool = False
    """Reboot a device that reconnecting did not bring back, where its driver can."""
    reboot_s: float = 180.0
    """The longest wait for it to be there again."""
    backoff_s: tuple[float, ...] = (60.0, 300.0, 1500.0)
    gate: Gate = Gate()
    rest_s: float = 0.0

    @property
    def times(self) -> tuple[str, str]:
        """What results are called: time to first token, and decode rate."""
        return ("cpu_ttft_ms", "cpu_decode_tok_s") if self.processor_time else ("ttft_ms", "decode_tok_s")


@dataclass
class Member:
    """A device in the farm. `device_class` is what its numbers may be compared within: same model of phone, same runtime."""

    device: Device
    device_class: str = ""
    stuck: bool = field(default=False, init=False)
    """Its lease ended while it was still measuring; it gets nothing until it comes back."""
    under_way: str = field(default="", init=False)
    """What it was last asked for."""

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def fidelity(self) -> Fidelity:
        return self.device.fidelity

    @property
    def remote(self) -> Remote | None:
        """The device, where it can be asked about a job that is under way."""
        return self.device if isinstance(self.device, Remote) else None

    def alive(self) -> bool:
        driver = getattr(self.device, "driver", None)
        check = getattr(self.device, "alive", None) or getattr(driver, "alive", None)
        return True if check is None else bool(check())

    def reconnect(self, hard: bool) -> bool:
        """Try to bring it back, by a reboot where `hard`; False where there is no such way. `alive` says whether it helped."""
        again = getattr(getattr(self.device, "driver", None), "reconnect", None)
        if again is None:
            return False
        try:
            again(hard)
        except DeviceError as error:
            log.warning("device %s: %s", self.name, error)
        return True

    def heartbeat(self) -> bool:
        """Whether a remote device is still at it. One that this process drives itself is bounded by its own time limit."""
        return self.remote is not None and self.remote.heartbeat(self.under_way)

    def run(self, task: Task, job: str, fence: int, lease_s: float, clock: Clock) -> Answer:
        """Never raises for what the device does. What it answers is checked, wherever it comes from."""
        self.under_way = job
        if self.remote is not None:
            return self.remote.run(task, job, fence, lease_s)
        try:
            answer = measure(self.device, task, clock.now, clock.sleep)
            return parse_answer(json.loads(json.dumps(answer.wire())), self.name, self.fidelity)
        except AnswerError as error:
            reason = str(error)
        except Exception as error:  # a device's own code failed; a bug there must not end the farm's thread
            log.exception("device %s", self.name)
            reason = f"{self.name}: its driver failed ({error!r})"[:500]
        return Answer(status="lost", device=self.name, fidelity=self.fidelity, reason=reason, started=clock.now())


@dataclass(frozen=True)
class Measured:
    """A job done well: the reading, and the places of its outliers."""

    reading: Reading
    outliers: tuple[int, ...]


def measure_precisely(
    member: Member, request: MeasureRequest, policy: Policy, clock: Clock, *, job: str, fence: int = 0, lease_s: float = 0.0,
    expect: str | None = None, keep: Callable[[], bool] = lambda: True,
) -> Measured | Answer | None:  # fmt: skip
    """Batches of 5, 10, 15 ... repeats until the medians are sure enough or `max_repeats` are done.

    Returns the answer of the first batch that was not ok. `keep` is called before each further batch and ends all with
    None where it says False: the lease is lost.
    """
    answers: list[Answer] = []
    done, batch = 0, max(policy.min_repeats, 1)
    while True:
        asked = replace(request, repeats=batch, bandwidth=False)  # nobody asks a search's candidate for its share of it
        task = Task(request=asked, warmup=policy.warmup, rest_s=policy.rest_s, gate=policy.gate,
                    expect=expect)  # fmt: skip
        answer = member.run(task, f"{job}/{len(answers)}", fence, lease_s, clock)
        if answer.status != "ok" and not (policy.processor_time and answer.status == "contended" and answer.measurement):
            return answer
        if policy.processor_time and not answer.measurement.get("prefill_cpu_seconds"):
            return replace(answer, status="unsupported", reason=f"{member.name} tells no processor time")
        answers.append(answer)
        done += batch
        batch = min(batch + (0 if policy.processor_time else policy.min_repeats), policy.max_repeats - done)
        if batch < 1 or _precise(answers, policy) or len(answer.samples) < 2:
            return _measured(member, answers, policy)
        if not keep():
            return None


def _pooled(answers: list[Answer], name: str) -> list[float]:
    """Of all batches: each timed repeat's value, or of processor time each batch's mean."""
    if name == "cpu_ttft_ms":
        return [1e3 * answer.measurement["prefill_cpu_seconds"] for answer in answers]
    if name == "cpu_decode_tok_s":
        return [answer.measurement["decode_tokens"] / answer.measurement["decode_cpu_seconds"] for answer in answers
                if answer.measurement.get("decode_cpu_seconds")]  # fmt: skip
    return [value for answer in answers for value in answer.counted(name)]


def _precise(answers: list[Answer], policy: Policy) -> bool:
    if policy.processor_time and len(answers) < 3:
        return False
    return all(half_width(values) <= policy.half_width for name in policy.times if (values := _pooled(answers, name)))


def _measured(member: Member, answers: list[Answer], policy: Policy) -> Measured:
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in policy.times:
        if raw := _pooled(answers, name):
            values[name], errors[name] = median(raw), standard_error(raw)
    peaks = [answer.measurement.get("peak_memory_bytes") for answer in answers]
    values |= {"peak_memory_bytes": float(max(peak for peak in peaks if peak is not None))} if any(peaks) else {}
    first, last = answers[0], answers[-1]
    detail: dict[str, Any] = {
        "before": first.wire()["before"], "after": last.wire()["after"],
        "printed": {key: value for key, value in last.measurement.items() if key not in ("samples", "device", "fidelity")},
    }  # fmt: skip
    reading = Reading(
        device=member.name, fidelity=member.fidelity, status="ok", values=values, errors=errors,
        samples=[[dict(sample) for sample in answer.samples] for answer in answers], output_hash=last.output_hash,
        started=first.started or 0.0, ended=last.ended or 0.0, detail=detail,
    )  # fmt: skip
    return Measured(reading, tuple(outliers(_pooled(answers, policy.times[0]), policy.outlier_mad)))


def request_payload(request: MeasureRequest, expect: str | None = None) -> dict[str, Any]:
    """A request as a job holds it; with the model's content, so that a changed file is not taken for the one submitted."""
    return {**asdict(request), "model": str(request.model), "sha256": sha256(request.model), "expect": expect}


def payload_request(payload: Mapping[str, Any]) -> MeasureRequest:
    fields = {key: value for key, value in payload.items() if key not in ("sha256", "expect", "model", "cores")}
    return MeasureRequest(**fields, model=Path(payload["model"]), cores=tuple(payload["cores"]))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
