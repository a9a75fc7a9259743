"""Measures jobs on several devices at once, and makes of every failure what it deserves (docs/devices.md has the table).

`Farm.work` is one step of one device, without threads, so that tests play hours in milliseconds; `start` lets a thread a
device do it for ever. A device's thread only leases, measures and reports: all decisions are transactions of the store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from search.agent.answer import Answer
from search.devices.base import MeasureRequest
from search.health import Health
from search.jobs import JobQueue, Lease, Role
from search.members import Clock, Measured, Member, Policy, measure_precisely, payload_request, request_payload, sha256
from search.records import Job, Reading, State, StoredReading
from search.store import Store

log = logging.getLogger(__name__)
HOPELESS: dict[str, State] = {"crashed": "infeasible", "oom": "infeasible", "unsupported": "infeasible", "bad_output": "failed"}
"""Not tried again: the candidate cannot run on this class of device, or computed something else there."""
POSTPONED = ("hot", "throttled", "contended")
IDLE_S = 0.1


class Farm:
    """Use as a context: its threads end with it."""

    def __init__(
        self, store: Store, members: Sequence[Member], *, policy: Policy | None = None, clock: Clock | None = None,
        sentinel: MeasureRequest | None = None, on_end: Callable[[Job], None] = lambda job: None,
    ) -> None:  # fmt: skip
        """`on_end` is called, in a device's thread, after a job ended. Raises ValueError for members that do not mix."""
        self.queue, self.policy, self.clock = JobQueue(store), policy or Policy(), clock or Clock()
        self.members, self.on_end = list(members), on_end
        self._check_members()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        timed = sentinel if all(member.fidelity != "emulated" for member in members) else None
        self.health = Health(self.queue, self.policy, self.clock, timed, self._pause)
        for member in self.members:
            self.health.restart(member)

    def _check_members(self) -> None:
        names = [member.name for member in self.members]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"devices {names}; expected at least one, each once: two measurements at a time disturb")
        for member in self.members:
            kinds = {other.fidelity for other in self.members if other.device_class == member.device_class}
            if len(kinds) > 1:
                raise ValueError(f"device class {member.device_class!r} has devices of fidelity {' and '.join(sorted(kinds))}; "
                                 "their numbers are never mixed: give each fidelity its own class")  # fmt: skip

    def submit(
        self, name: str, request: MeasureRequest, *, trial: int | None = None, device_class: str = "", expect: str | None = None
    ) -> int:
        """A measurement job; a name submitted before is that job. `expect` is the output's right checksum, where known."""
        if not any(member.device_class == device_class for member in self.members):
            known = sorted({member.device_class for member in self.members})
            raise ValueError(f"job {name}: no device of class {device_class!r}; expected one of {known}")
        if self.policy.processor_time and request.threads != 1:
            raise ValueError(f"job {name}: threads={request.threads} by processor time, which says nothing of how long several "
                             "threads take together; expected 1")  # fmt: skip
        return self.queue.submit(name, request_payload(request, expect), trial=trial, device_class=device_class)

    def confirm(self, job: int, reason: str) -> int:
        """Measure an ended job once more, on another device where there is one: a predictor finds it 4 sigma off, say."""
        old = self.queue.newest(job)
        readings = self.queue.readings(old.id)
        self.queue.store.event("confirm", trial=old.trial, job=old.id, reason=reason)
        return self.queue.submit(f"{old.name}+", old.payload, trial=old.trial, device_class=old.device_class, replaces=old.id,
                                 avoid=[reading.device for reading in readings])  # fmt: skip

    # --- one step of one device --------------------------------------------------------------------------------------

    def work(self, member: Member) -> bool:
        """Whether there was anything to do: expired leases, the sentinel, a job."""
        self.expire()
        if not self.health.ready(member):
            return False
        others = {other.name for other in self.members if other is not member and other.device_class == member.device_class
                  and self.health.well(other)}  # fmt: skip
        lease = self.queue.lease(member.name, member.device_class, self.policy.lease_factor * 600.0, others=others)
        if lease is None:
            return False
        self._do(member, lease, alone=not others)
        member.stuck = False
        return True

    def expire(self) -> None:
        """Take back leases that are over, and fail what no device is left for."""
        for job in self.queue.expire(self.policy.max_attempts):
            for member in self.members:
                if member.name == job.device:
                    member.stuck = True
                    self.health.failed(member, f"no answer to {job.name} before its lease ended")
            self._ended(job.id)
        records = {member.name: self.health.record(member) for member in self.members}
        for name in {member.device_class for member in self.members}:
            if all(records[member.name].state == "retired" for member in self.members if member.device_class == name):
                for job in self.queue.jobs("waiting", kind="measure"):
                    if job.device_class == name and self.queue.cancel(job.id, "no device of its class is left", state="failed"):
                        self._ended(job.id)

    def _do(self, member: Member, lease: Lease, *, alone: bool) -> None:
        job, request = lease.job, payload_request(lease.job.payload)
        if not request.model.is_file() or sha256(request.model) != job.payload["sha256"]:
            self._finish(lease, "failed", f"{request.model} is no longer the file that was submitted")
            return
        wait_s = self.policy.gate.max_wait_s if self.policy.gate.max_c is not None else 0.0
        lease_s = self.policy.lease_factor * request.timeout_s + wait_s + self.policy.rest_s
        self.queue.renew(lease, lease_s)
        with self._heartbeat(member, lease, lease_s):
            found = measure_precisely(
                member, request, self.policy, self.clock, job=job.name, fence=lease.fence, lease_s=lease_s,
                expect=job.payload.get("expect"), keep=lambda: self.queue.renew(lease, lease_s),
            )  # fmt: skip
        if isinstance(found, Measured):
            self._measured(member, lease, found, alone)
        elif isinstance(found, Answer):
            self._went_wrong(member, lease, found)

    def _measured(self, member: Member, lease: Lease, found: Measured, alone: bool) -> None:
        sentinel = self.health.record(member).sentinel
        first = found.reading.values.get(self.policy.times[0])
        ratio = first / sentinel if sentinel and first is not None else None
        detail = {**found.reading.detail, "outliers": list(found.outliers)}
        reading = replace(found.reading, sentinel_ratio=ratio, detail=detail)
        earlier = [old for old in self.queue.readings(lease.job.id) if old.role == "confirmation"]
        if found.outliers and not earlier and not alone:
            reason = f"{len(found.outliers)} outliers: to be confirmed by another device"
            self.queue.put_back(lease, reason, counts=False, avoid_here=True, readings=[(reading, "confirmation")])
            self.health.done(member)
            return
        chosen, promote = self._choose(reading, earlier[0] if earlier else None, lease.job)
        role: Role = "result" if promote is None else "confirmation"
        if self.queue.finish(lease, "ok", chosen.values, readings=[(reading, role)], promote=promote):
            self.health.done(member)
            self._ended(lease.job.id)

    def _choose(self, new: Reading, old: StoredReading | None, job: Job) -> tuple[Reading, int | None]:
        """Of two readings the one that is surer of its median; both stay. Two that disagree are an event."""
        if old is None:
            return new, None
        name = self.policy.times[0]
        pair = [(reading.sentinel_ratio, reading.values.get(name, 1.0)) for reading in (new, old)]
        (ratio, value), (other_ratio, other_value) = pair
        off = ratio / other_ratio - 1 if ratio and other_ratio else value / other_value - 1
        if abs(off) > self.policy.agreement:
            self.queue.store.event("disagreement", trial=job.trial, job=job.id, device=new.device, other=old.device, off=off)

        def unsure(reading: Reading) -> float:
            return reading.errors.get(name, 0.0) / reading.values.get(name, 1.0)

        return (new, None) if unsure(new) <= unsure(old) else (old, old.id)

    def _went_wrong(self, member: Member, lease: Lease, answer: Answer) -> None:
        """The table of failures, by the answer's status."""
        job, status = lease.job, answer.status
        reason = f"{status}: {answer.reason}"
        self.queue.store.event(status, trial=job.trial, job=job.id, device=member.name, reason=answer.reason, log=answer.log,
                               exit_code=answer.exit_code, samples=[dict(sample) for sample in answer.samples])  # fmt: skip
        if status in HOPELESS:
            self._finish(lease, HOPELESS[status], reason)
        elif status in POSTPONED or answer.started is None:
            self._postpone(lease, reason)
        elif status == "timeout" and self._timeouts(job) >= 1:
            self._finish(lease, "infeasible", f"{reason} (the second time)")
        elif job.attempts + 1 >= self.policy.max_attempts:
            self._finish(lease, "failed", f"{reason} (attempt {job.attempts + 1} of {self.policy.max_attempts})")
        else:
            self.queue.put_back(lease, reason, counts=True, avoid_here=True)
        if status in POSTPONED:
            self.health.wait(member)
        elif status != "unsupported":
            self.health.failed(member, reason, lost=status == "lost", by_model=status in ("crashed", "oom"))

    def _postpone(self, lease: Lease, reason: str) -> None:
        if lease.job.postponed + 1 >= self.policy.max_postponed:
            self._finish(lease, "failed", f"{reason} (put off {lease.job.postponed + 1} times)")
        else:
            self.queue.put_back(lease, reason, counts=False)

    def _timeouts(self, job: Job) -> int:
        found = self.queue.store.rows("SELECT count(*) FROM events WHERE job = ? AND kind = 'put_back' AND"
                                      " json_extract(detail, '$.reason') LIKE 'timeout:%'", job.id)  # fmt: skip
        return found[0][0]

    def _finish(self, lease: Lease, state: State, reason: str) -> None:
        if self.queue.finish(lease, state, reason=reason):
            self._ended(lease.job.id)

    def _ended(self, job: int) -> None:
        found = self.queue.job(job)
        if found.ended:
            self.on_end(found)

    # --- threads -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """A thread a device. After `stop` it may be started again; a thread that was not waited for goes on."""
        self._stop.clear()
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        running = {thread.name for thread in self._threads}
        for member in self.members:
            if f"device {member.name}" in running:
                continue
            thread = threading.Thread(target=self._loop, args=(member,), name=f"device {member.name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, wait_s: float = 5.0) -> None:
        """What is being measured is not waited for longer than that; its answer comes too late."""
        self._stop.set()
        for thread in self._threads:
            thread.join(wait_s)

    def __enter__(self) -> Farm:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _loop(self, member: Member) -> None:
        while not self._stop.is_set():
            try:
                busy = self.work(member)
            except Exception:
                log.exception("the farm's step for %s failed; the lease brings its job back", member.name)
                busy = False
            if not busy:
                self._stop.wait(IDLE_S)

    def _pause(self, seconds: float) -> None:
        if self._threads:
            self._stop.wait(seconds)
        else:
            self.clock.sleep(seconds)

    @contextmanager
    def _heartbeat(self, member: Member, lease: Lease, lease_s: float) -> Iterator[None]:
        """Renew the lease as long as the device's agent says that it is at it."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.policy.heartbeat_s):
                if member.heartbeat():
                    self.queue.renew(lease, lease_s)

        thread = threading.Thread(target=beat, daemon=True) if self._threads and member.remote is not None else None
        if thread is not None:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread is not None:
                thread.join()
