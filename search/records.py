"""What the database of a sweep holds, as values. Times are seconds since 1970; results are named numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from search.devices.base import Fidelity

State = Literal["waiting", "running", "ok", "infeasible", "failed", "cancelled"]
STATES: tuple[State, ...] = ("waiting", "running", "ok", "infeasible", "failed", "cancelled")
TERMINAL: tuple[State, ...] = STATES[2:]
"""ok: has results; infeasible: the candidate cannot be run (crash, out of memory, timeout twice); failed: it could not be
judged (wrong output, attempts used up); cancelled: nobody wants it any more. Failures never become numbers."""

WORST: tuple[State, ...] = ("infeasible", "failed", "cancelled")
"""Ends without results."""

Results = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and what became of it."""

    number: int
    key: str
    """Canonical key of the candidate: equal keys are the same architecture."""
    config: Mapping[str, Any]
    state: State
    results: Results | None
    noise: Results
    """Standard error of each result, where known."""
    reason: str
    duplicate_of: int | None
    told: int | None
    """The how-manyeth answer the optimizer was given; None while it has not been told."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work that one device or worker does."""

    id: int
    name: str
    """Unique; submitting a name twice is submitting it once."""
    kind: str
    trial: int | None
    device_class: str
    payload: Mapping[str, Any]
    state: State
    attempts: int
    """Tries that count: lost, timed out. Waiting for a cool or idle device does not."""
    postponed: int
    """Returns to the queue that do not count as attempts."""
    fence: int
    """Grows with every lease; only the newest lease may finish the job."""
    device: str | None
    lease_until: float | None
    not_before: float
    avoid: tuple[str, ...]
    """Devices where it failed: others of the class are taken first."""
    results: Results | None
    reason: str
    replaces: int | None
    """The job that this one measures again."""

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One measurement as it goes into the database: never without its fidelity and its raw samples."""

    device: str
    fidelity: Fidelity
    status: str
    values: Results
    errors: Results
    samples: Any
    """Raw, per repeat, warm-up included and marked."""
    output_hash: str | None = None
    sentinel_ratio: float | None = None
    """The first value over the device's sentinel, which takes out what differs between two devices of a class."""
    started: float = 0.0
    ended: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredReading(Reading):
    id: int
    job: int
    role: Literal["result", "confirmation", "drifted"]
    fence: int


Health = Literal["healthy", "quarantined", "retired"]


@dataclass(frozen=True, kw_only=True)
class DeviceRecord:
    """What the farm knows of a device; survives a restart."""

    name: str
    device_class: str
    fidelity: Fidelity
    state: Health = "healthy"
    failures: int = 0
    """In a row."""
    step: int = 0
    """Of the back-off: how often it was quarantined since it was last well."""
    until: float = 0.0
    """End of its quarantine."""
    baseline: float | None = None
    """Median of the sentinel's first measurement."""
    sentinel: float | None = None
    """Its newest good one."""
    checked: float = 0.0
    """When that was."""
    jobs_since: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Event:
    """Something that happened and is not a result: a late answer, a quarantine, a drift."""

    time: float
    kind: str
    trial: int | None
    job: int | None
    device: str | None
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class Artefact:
    """A file by its content; a finished one is found again and not made again."""

    sha256: str
    kind: str
    path: str
    size: int
    trial: int | None
