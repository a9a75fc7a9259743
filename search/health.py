"""Which devices may be believed: failures in a row, quarantine with growing pauses, and the sentinel that shows drift.

The sentinel is one model that every device measures again and again. More than 5 % off the device's own first time for it,
and what the device measured since it was last right is measured again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from search.agent.answer import Answer
from search.devices.base import MeasureRequest
from search.jobs import JobQueue
from search.members import Clock, Measured, Member, Policy, measure_precisely
from search.records import DeviceRecord

log = logging.getLogger(__name__)
NOT_ITS_FAULT = ("hot", "contended", "throttled")


class Health:
    """Of the members of one farm; all of it is in the database, so a restart forgets no quarantine."""

    def __init__(
        self, queue: JobQueue, policy: Policy, clock: Clock, sentinel: MeasureRequest | None, pause: Callable[[float], None]
    ) -> None:
        self.queue, self.store, self.policy, self.clock = queue, queue.store, policy, clock
        self.sentinel, self.pause = sentinel, pause
        self._again: dict[str, float] = {}

    def record(self, member: Member) -> DeviceRecord:
        known = DeviceRecord(name=member.name, device_class=member.device_class, fidelity=member.fidelity)
        return self.store.device(known)

    def well(self, member: Member) -> bool:
        return not member.stuck and self.record(member).state == "healthy"

    def ready(self, member: Member) -> bool:
        """Whether it may have a job now. Measures the sentinel where that is due, also to end a quarantine."""
        record, now = self.record(member), self.clock.now()
        if record.state == "retired" or now < max(record.until, self._again.get(member.name, 0.0)):
            return False
        if record.state == "quarantined" and not member.alive():
            self.quarantine(member, "it still cannot be reached")
            return False
        due = self.sentinel is not None and (
            record.state == "quarantined" or record.baseline is None or record.jobs_since >= self.policy.sentinel_jobs
            or now - record.checked >= self.policy.sentinel_s
        )  # fmt: skip
        if due and not self._check_sentinel(member):
            return False
        record = self.record(member)
        if record.state == "quarantined":
            step = record.step if self.sentinel is None else 0  # a good sentinel shows that it is well; an answer does not
            self.store.put_device(replace(record, state="healthy", failures=0, step=step, reason=""))
            self.store.event("healthy_again", device=member.name)
        return True

    def done(self, member: Member) -> None:
        """It did a job well."""
        record = self.record(member)
        self.store.put_device(replace(record, failures=0, step=0, jobs_since=record.jobs_since + 1))

    def failed(self, member: Member, reason: str, *, lost: bool = False, by_model: bool = False) -> None:
        """It did not. A lost one is called a few times first; three failures in a row are a quarantine.

        Where it may well be the models that crash (`by_model`), the sentinel is asked first, at once.
        """
        record = self.record(member)
        record = self.store.put_device(replace(record, failures=record.failures + 1, reason=reason[:300]))
        if record.failures >= self.policy.failures_in_row and by_model and self.sentinel is not None:
            self.store.put_device(replace(record, failures=0, jobs_since=self.policy.sentinel_jobs))
        elif record.failures >= self.policy.failures_in_row:
            self.quarantine(member, f"{record.failures} failures in a row, the last: {reason}")
        elif lost and not self._reconnected(member):
            self.quarantine(member, f"it cannot be reached: {reason}")

    def _reconnected(self, member: Member) -> bool:
        for _ in range(self.policy.reconnects):
            if member.alive():
                return True
            member.reconnect(hard=False)
            self.pause(self.policy.reconnect_s)
        if member.alive():
            return True
        if not self.policy.reboot or not member.reconnect(hard=True):
            return False
        self.store.event("rebooted", device=member.name)
        until = self.clock.now() + self.policy.reboot_s
        while self.clock.now() < until:
            self.pause(max(self.policy.reconnect_s, 0.1))
            if member.alive():
                return True
        return False

    def wait(self, member: Member) -> None:
        """It is hot or busy: leave it alone for a while."""
        self._again[member.name] = self.clock.now() + self.policy.retry_s

    def quarantine(self, member: Member, reason: str) -> None:
        """For 1, 5, then 25 minutes; after that it is out until the next start."""
        record = self.record(member)
        step = record.step
        if step >= len(self.policy.backoff_s):
            self.store.put_device(replace(record, state="retired", reason=reason[:300]))
            self.store.event("retired", device=member.name, reason=reason)
            log.warning("device %s is out of this sweep: %s", member.name, reason)
            return
        pause = self.policy.backoff_s[step]
        self.store.put_device(replace(record, state="quarantined", step=step + 1, until=self.clock.now() + pause, failures=0,
                                      reason=reason[:300]))  # fmt: skip
        self.store.event("quarantined", device=member.name, reason=reason, seconds=pause)
        log.warning("device %s is left alone for %g s: %s", member.name, pause, reason)

    def restart(self, member: Member) -> None:
        """A new start gives a device that was out another chance, at the end of which the sentinel stands."""
        record = self.record(member)
        if record.state == "retired":
            self.store.put_device(replace(record, state="quarantined", step=0, until=0.0))

    def _check_sentinel(self, member: Member) -> bool:
        """False where the device must not be used now."""
        for turn in ("first", "second"):
            value = self._measure_sentinel(member)
            if value is None:
                return False
            record, now = self.record(member), self.clock.now()
            baseline = value if record.baseline is None else record.baseline
            off = value / baseline - 1
            self.store.event("sentinel", device=member.name, value=value, baseline=baseline, off=off)
            if abs(off) <= self.policy.drift:
                self.store.put_device(replace(record, baseline=baseline, sentinel=value, checked=now, jobs_since=0))
                return True
            if turn == "first":
                again = self.queue.replace_drifted(member.name, record.checked)
                self.store.event("drift", device=member.name, off=off, measured_again=len(again))
                log.warning("device %s is %+.1f %% off; %d jobs are measured again", member.name, 100 * off, len(again))
                self.pause(self.policy.cool_s)
        self.quarantine(member, f"its sentinel was off twice, by {100 * off:+.1f} % at last")
        return False

    def _measure_sentinel(self, member: Member) -> float | None:
        assert self.sentinel is not None
        job = f"sentinel-{member.name}-{self.clock.now()!r}"
        found = measure_precisely(member, self.sentinel, self.policy, self.clock, job=job,
                                  lease_s=self.policy.lease_factor * self.sentinel.timeout_s)  # fmt: skip
        if isinstance(found, Measured):
            return found.reading.values[self.policy.times[0]]
        assert isinstance(found, Answer)
        if found.status in NOT_ITS_FAULT:
            self.wait(member)
        elif self.record(member).state == "quarantined":
            self.quarantine(member, f"its sentinel failed, {found.status}: {found.reason}")
        else:
            self.failed(member, f"its sentinel failed, {found.status}: {found.reason}", lost=found.status == "lost")
        return None
