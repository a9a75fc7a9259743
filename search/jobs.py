"""The queue of a sweep's jobs: leases, fences, and exactly one end for every job.

A lease is the right to work on a job until a time; whoever holds it renews it. One that is over sends the job back to the
queue, and the next lease has a higher fence: an answer with an old fence comes too late and is an event, never a result.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from search.records import TERMINAL, Job, Reading, Results, State, StoredReading
from search.store import Store, among

Role = Literal["result", "confirmation", "drifted"]


@dataclass(frozen=True)
class Lease:
    """The right to finish a job."""

    job: Job
    device: str
    fence: int


class JobQueue:
    """Every method is one transaction of the store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def submit(
        self, name: str, payload: Mapping[str, Any], *, kind: str = "measure", trial: int | None = None, device_class: str = "",
        replaces: int | None = None, avoid: Sequence[str] = (),
    ) -> int:  # fmt: skip
        """The job's id; a name that was submitted before is that job, whatever became of it."""
        with self.store.transaction() as sql:
            sql.execute("INSERT OR IGNORE INTO jobs (name, kind, trial, device_class, payload, state, avoid, replaces, created)"
                        " VALUES (?, ?, ?, ?, ?, 'waiting', ?, ?, ?)",
                        (name, kind, trial, device_class, json.dumps(dict(payload)), json.dumps(list(avoid)), replaces,
                         self.store.clock()))  # fmt: skip
            return sql.execute("SELECT id FROM jobs WHERE name = ?", (name,)).fetchone()[0]

    def lease(
        self, device: str, device_class: str, seconds: float, *, kind: str = "measure", others: Collection[str] = ()
    ) -> Lease | None:
        """The oldest job that this device may take; one to be avoided here only where none of `others`, the devices of its
        class that are well, is better."""
        now = self.store.clock()
        with self.store.transaction() as sql:
            waiting = sql.execute("SELECT * FROM jobs WHERE state = 'waiting' AND kind = ? AND device_class = ? AND"
                                  " not_before <= ? ORDER BY id", (kind, device_class, now))  # fmt: skip
            found = next((row for row in waiting if device not in (avoid := set(json.loads(row["avoid"])))
                          or avoid.issuperset(others)), None)  # fmt: skip
            if found is None:
                return None
            fence = found["fence"] + 1
            sql.execute("UPDATE jobs SET state = 'running', fence = ?, device = ?, lease_until = ? WHERE id = ?",
                        (fence, device, now + seconds, found["id"]))  # fmt: skip
            return Lease(self.job(found["id"]), device, fence)

    def renew(self, lease: Lease, seconds: float) -> bool:
        """False where the lease was lost: what is being done is for nothing."""
        with self.store.transaction() as sql:
            done = sql.execute("UPDATE jobs SET lease_until = ? WHERE id = ? AND fence = ? AND state = 'running'",
                               (self.store.clock() + seconds, lease.job.id, lease.fence))  # fmt: skip
            return done.rowcount == 1

    def finish(
        self, lease: Lease, state: State, results: Results | None = None, reason: str = "",
        readings: Sequence[tuple[Reading, Role]] = (), promote: int | None = None,
    ) -> bool:  # fmt: skip
        """End the job. False where the lease was lost: the answer is then noted as an event and nothing else.

        `promote` is an earlier reading of it, kept to be confirmed, that becomes its result.
        """
        if state not in TERMINAL or (state == "ok") != (results is not None):
            raise ValueError(f"job {lease.job.name}: state {state!r} with results {results}; only ok has results")
        with self.store.transaction() as sql:
            ended = sql.execute("UPDATE jobs SET state = ?, results = ?, reason = ?, lease_until = NULL, ended = ?"
                                " WHERE id = ? AND fence = ? AND state = 'running'",
                                (state, None if results is None else json.dumps(dict(results)), reason, self.store.clock(),
                                 lease.job.id, lease.fence))  # fmt: skip
            if ended.rowcount != 1:
                return self._late(lease, f"ended {state}", results)
            self._keep(sql, lease, readings)
            if promote is not None:
                sql.execute("UPDATE measurements SET role = 'result' WHERE id = ? AND job = ?", (promote, lease.job.id))
            return True

    def put_back(
        self, lease: Lease, reason: str, *, counts: bool, delay_s: float = 0.0, avoid_here: bool = False,
        readings: Sequence[tuple[Reading, Role]] = (),
    ) -> bool:  # fmt: skip
        """Back to the queue, as an attempt where it `counts`. False where the lease was lost."""
        avoid = sorted({*self.job(lease.job.id).avoid, *([lease.device] if avoid_here else [])})
        count = "attempts = attempts + 1" if counts else "postponed = postponed + 1"
        with self.store.transaction() as sql:
            done = sql.execute("UPDATE jobs SET state = 'waiting', lease_until = NULL, reason = ?, not_before = ?, avoid = ?,"
                               f" {count} WHERE id = ? AND fence = ? AND state = 'running'",
                               (reason, self.store.clock() + delay_s, json.dumps(avoid), lease.job.id,
                                lease.fence))  # fmt: skip
            if done.rowcount != 1:
                return self._late(lease, reason, None)
            self._keep(sql, lease, readings)
            self.store.event("put_back", trial=lease.job.trial, job=lease.job.id, device=lease.device, reason=reason,
                             counts=counts)
            return True

    def expire(self, max_attempts: int) -> list[Job]:
        """End all leases that are over: back to the queue, or failed where that was the last attempt."""
        with self.store.transaction():
            over = [_job(row) for row in self.store.rows("SELECT * FROM jobs WHERE state = 'running' AND lease_until < ?",
                                                         self.store.clock())]  # fmt: skip
            for job in over:
                lease = Lease(job, job.device or "", job.fence)
                reason = f"the lease of {job.device} ended without an answer"
                if job.attempts + 1 >= max_attempts:
                    self.finish(lease, "failed", reason=f"{reason}, {max_attempts} times in all")
                else:
                    self.put_back(lease, reason, counts=True, avoid_here=True)
        return over

    def recover(self, *, all_leases: bool = True) -> int:
        """At the start of a service: running jobs go back to the queue, uncounted; how many.

        All of them, because the writer's lock shows that the service that leased them is gone and nobody else could
        hand in their results; without `all_leases` only those whose lease is over.
        """
        with self.store.transaction():
            lost = [job for job in self.jobs("running") if all_leases or (job.lease_until or 0.0) < self.store.clock()]
            for job in lost:
                self.put_back(Lease(job, job.device or "", job.fence), "the service was stopped", counts=False)
        return len(lost)

    def cancel(self, job: int, reason: str, state: State = "cancelled") -> bool:
        """End a job that nobody wants, or can do, any more; also a running one, whose answer will then come too late."""
        with self.store.transaction() as sql:
            done = sql.execute("UPDATE jobs SET state = ?, lease_until = NULL, fence = fence + 1, reason = ?,"
                               " ended = ? WHERE id = ? AND ended IS NULL",
                               (state, reason, self.store.clock(), job))  # fmt: skip
            return done.rowcount == 1

    def replace_drifted(self, device: str, since: float) -> list[int]:
        """Measure again what this device measured since a time: ids of the new jobs, each `replaces` an old one.

        The old readings stay, marked `drifted`.
        """
        with self.store.transaction() as sql:
            made = []
            for row in self.store.rows("SELECT id, job FROM measurements WHERE device = ? AND role = 'result' AND ended > ?"
                                       " ORDER BY id", device, since):  # fmt: skip
                job = self.job(row["job"])
                sql.execute("UPDATE measurements SET role = 'drifted' WHERE id = ?", (row["id"],))
                made.append(self.submit(f"{job.name}+", job.payload, kind=job.kind, trial=job.trial,
                                        device_class=job.device_class, replaces=job.id))  # fmt: skip
            return made

    def job(self, job: int) -> Job:
        """Raises KeyError."""
        found = self.store.rows("SELECT * FROM jobs WHERE id = ?", job)
        if not found:
            raise KeyError(job)
        return _job(found[0])

    def jobs(self, *states: State, trial: int | None = None, kind: str | None = None) -> list[Job]:
        conditions = {"trial = ?": trial, "kind = ?": kind}
        given = {text: value for text, value in conditions.items() if value is not None}
        where = " AND ".join([among(states), *given])
        return [_job(row) for row in self.store.rows(f"SELECT * FROM jobs WHERE {where} ORDER BY id", *given.values())]

    def num_open(self) -> int:
        """Jobs that have not ended."""
        return self.store.rows("SELECT count(*) FROM jobs WHERE state IN ('waiting', 'running')")[0][0]

    def remeasured(self) -> list[int]:
        """Trials that have a job which was done again with success."""
        return [row[0] for row in self.store.rows("SELECT DISTINCT trial FROM jobs WHERE state = 'ok' AND replaces IS NOT NULL"
                                                  " AND trial IS NOT NULL ORDER BY trial")]  # fmt: skip

    def newest(self, job: int) -> Job:
        """The job, or the last of those that measured it again: whose results count."""
        while found := self.store.rows("SELECT id FROM jobs WHERE replaces = ?", job):
            job = found[0]["id"]
        return self.job(job)

    def readings(self, job: int) -> list[StoredReading]:
        """All of a job's measurements, in the order in which they came."""
        return [_reading(row) for row in self.store.rows("SELECT * FROM measurements WHERE job = ? ORDER BY id", job)]

    def _keep(self, sql: sqlite3.Connection, lease: Lease, readings: Sequence[tuple[Reading, Role]]) -> None:
        for reading, role in readings:
            sql.execute("INSERT INTO measurements (job, role, fence, device, fidelity, status, results, errors, samples,"
                        " output_hash, sentinel_ratio, started, ended, detail) VALUES (?" + ", ?" * 13 + ")",
                        (lease.job.id, role, lease.fence, reading.device, reading.fidelity, reading.status,
                         json.dumps(dict(reading.values)), json.dumps(dict(reading.errors)), json.dumps(reading.samples),
                         reading.output_hash, reading.sentinel_ratio, reading.started, reading.ended,
                         json.dumps(dict(reading.detail))))  # fmt: skip

    def _late(self, lease: Lease, what: str, results: Results | None) -> bool:
        self.store.event("late_answer", trial=lease.job.trial, job=lease.job.id, device=lease.device, fence=lease.fence,
                         newest=self.job(lease.job.id).fence, what=what, results=dict(results or {}))  # fmt: skip
        return False


def violations(queue: JobQueue) -> list[str]:
    """What must never be, in words; empty for a sound database. Meant for tests and for `sweep status`.

    Every ended job has one end (the tables' own checks see to its form), every job that is ok has one accepted
    measurement and no other job has any, an ended trial has no open job of its own, and fidelities are not mixed.
    """
    found = []
    for row in queue.store.rows("SELECT name, state, kind, (SELECT count(*) FROM measurements WHERE job = jobs.id AND"
                                " role != 'confirmation') AS accepted FROM jobs"):  # fmt: skip
        if row["kind"] == "measure" and row["accepted"] != (row["state"] == "ok"):
            found.append(f"job {row['name']} is {row['state']} and has {row['accepted']} accepted measurements")
    for row in queue.store.rows("SELECT name, trial FROM jobs WHERE ended IS NULL AND replaces IS NULL AND trial IN"
                                " (SELECT number FROM trials WHERE ended IS NOT NULL)"):  # fmt: skip
        found.append(f"trial {row['trial']} has ended and its job {row['name']} has not")
    for row in queue.store.rows("SELECT device_class, count(DISTINCT fidelity) AS kinds FROM measurements JOIN jobs ON"
                                " jobs.id = job GROUP BY device_class HAVING kinds > 1"):  # fmt: skip
        found.append(f"device class {row['device_class']!r} has measurements of {row['kinds']} fidelities")
    return found


def _job(row: sqlite3.Row) -> Job:
    fields = {key: row[key] for key in row.keys() if key not in ("payload", "avoid", "results", "created", "ended")}
    results = None if row["results"] is None else json.loads(row["results"])
    return Job(**fields, payload=json.loads(row["payload"]), avoid=tuple(json.loads(row["avoid"])), results=results)


def _reading(row: sqlite3.Row) -> StoredReading:
    loaded = {name: json.loads(row[column]) for name, column in
              (("values", "results"), ("errors", "errors"), ("samples", "samples"), ("detail", "detail"))}  # fmt: skip
    plain = {key: row[key] for key in row.keys() if key not in ("results", *loaded)}
    return StoredReading(**plain, **loaded)
