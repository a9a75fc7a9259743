"""The database of a sweep: SQLite in WAL mode with one writer and any number of readers.

Every change is one transaction, so a process that is killed at any point leaves a state that the next one goes on from.
The trials, devices, events, artefacts and optimizer snapshots are here; the queue of jobs is search/jobs.py over it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from search.database import Database, StoreError
from search.records import TERMINAL, Artefact, DeviceRecord, Event, Results, State, Trial

KEPT_SNAPSHOTS = 3


def spec_hash(spec: Mapping[str, Any]) -> str:
    """Of everything that makes trials of two sweeps comparable: space, devices, metrics, limits, seed."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


class Store(Database):
    """Use `Store.open` to write and `Store.read` to look."""

    def __init__(self, path: Path, *, writer: bool, clock: Callable[[], float] = time.time) -> None:
        super().__init__(path, writer=writer)
        self.clock = clock

    @classmethod
    def open(cls, path: str | Path, spec: Mapping[str, Any], clock: Callable[[], float] = time.time) -> Store:
        """The one writer. Makes the file, or goes on with it. Raises StoreError: in use, damaged, of another sweep."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        store = cls(Path(path), writer=True, clock=clock)
        try:
            store._claim(json.loads(json.dumps(spec)))
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def read(cls, path: str | Path) -> Store:
        """A reader; it never waits for the writer and never makes it wait. Raises StoreError."""
        if not Path(path).is_file():
            raise StoreError(f"{path}: no such database; expected the one in a sweep's directory")
        return cls(Path(path), writer=False)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the sweep -------------------------------------------------------------------------------------------------

    def _claim(self, spec: Mapping[str, Any]) -> None:
        wanted, text = spec_hash(spec), json.dumps(spec, sort_keys=True)
        with self.transaction() as sql:
            found = sql.execute("SELECT spec_hash, spec FROM sweeps").fetchone()
            if found is None:
                sql.execute("INSERT INTO sweeps VALUES (1, ?, ?, 'space', ?)", (wanted, text, self.clock()))
            elif found["spec_hash"] != wanted:
                difference = _difference(json.loads(found["spec"]), spec)
                raise StoreError(f"{self.path} is the database of another sweep ({difference}); take that sweep's settings to "
                                 "resume it, or another output directory")  # fmt: skip

    @property
    def spec(self) -> dict[str, Any]:
        return json.loads(self.rows("SELECT spec FROM sweeps")[0]["spec"])

    @property
    def phase(self) -> str:
        """Where the sweep is: space, latency, gate, pareto, confirm, retrain, done."""
        return self.rows("SELECT phase FROM sweeps")[0]["phase"]

    @phase.setter
    def phase(self, phase: str) -> None:
        with self.transaction() as sql:
            sql.execute("UPDATE sweeps SET phase = ?", (phase,))

    # --- trials ----------------------------------------------------------------------------------------------------

    def add_trials(self, candidates: Sequence[tuple[str, Mapping[str, Any]]], snapshot: str | None = None) -> list[Trial]:
        """Candidates as (canonical key, config), numbered on; together with the optimizer's state after it proposed them.

        A key that an earlier trial has is marked as its duplicate: its results are used again (`settle_duplicates`).
        """
        with self.transaction() as sql:
            first = sql.execute("SELECT coalesce(max(number) + 1, 0) FROM trials").fetchone()[0]
            for number, (key, config) in enumerate(candidates, first):
                earlier = sql.execute("SELECT min(number) FROM trials WHERE key = ?", (key,)).fetchone()[0]
                sql.execute("INSERT INTO trials (number, key, config, state, duplicate_of, created)"
                            " VALUES (?, ?, ?, 'waiting', ?, ?)",
                            (number, key, json.dumps(config, sort_keys=True), earlier, self.clock()))  # fmt: skip
            self._keep_snapshot(sql, snapshot)
            return self.trials(first=first)

    def trials(self, *states: State, first: int = 0) -> list[Trial]:
        """In order of their numbers; of all states where none is named."""
        query = f"SELECT * FROM trials WHERE number >= ? AND {among(states)} ORDER BY number"
        return [_trial(row) for row in self.rows(query, first)]

    def num_trials(self, *states: State) -> int:
        """Of all states where none is named."""
        return self.rows(f"SELECT count(*) FROM trials WHERE {among(states)}")[0][0]

    def trial(self, number: int) -> Trial:
        """Raises KeyError."""
        found = self.rows("SELECT * FROM trials WHERE number = ?", number)
        if not found:
            raise KeyError(number)
        return _trial(found[0])

    def finish_trial(
        self, number: int, state: State, results: Results | None = None, noise: Results | None = None, reason: str = ""
    ) -> bool:
        """End a trial, once: False, and nothing changed, where it has ended already. Only `ok` has results."""
        if state not in TERMINAL or (state == "ok") != (results is not None):
            raise ValueError(f"trial {number}: state {state!r} with results {results}; only ok has results")
        with self.transaction() as sql:
            done = sql.execute("UPDATE trials SET state = ?, results = ?, noise = ?, reason = ?, ended = ?"
                               " WHERE number = ? AND ended IS NULL",
                               (state, _json(results), _json(noise or {}), reason, self.clock(), number))  # fmt: skip
            return done.rowcount == 1

    def start_trial(self, number: int) -> None:
        with self.transaction() as sql:
            sql.execute("UPDATE trials SET state = 'running' WHERE number = ? AND state = 'waiting'", (number,))

    def settle_duplicates(self) -> int:
        """Give every open duplicate what its ended original has; how many."""
        settled = 0
        with self.transaction():
            for trial in self.trials("waiting", "running"):
                of = self.trial(trial.duplicate_of) if trial.duplicate_of is not None else None
                if of is not None and of.state in TERMINAL:
                    settled += self.finish_trial(trial.number, of.state, of.results, of.noise, of.reason)
        return settled

    def amend_trial(self, number: int, results: Results, noise: Results, snapshot: str | None = None) -> None:
        """Correct the numbers of an ended trial: its measurement was found to have drifted and was done again.

        `snapshot` is the optimizer's state after it was told so, where it had been told the old ones.
        """
        with self.transaction() as sql:
            before = self.trial(number)
            sql.execute("UPDATE trials SET results = ?, noise = ? WHERE number = ? AND state = 'ok'",
                        (json.dumps(dict(results)), json.dumps(dict(noise)), number))  # fmt: skip
            self.event("amended", trial=number, before=before.results, after=dict(results))
            if before.told is not None:
                self.event("told", trial=number, results=dict(results), noise=dict(noise))
            self._keep_snapshot(sql, snapshot)

    def tell(self, number: int, snapshot: str | None = None) -> int:
        """Note that the optimizer was given this trial's answer, with its state after that. Returns the answer's place.

        An event `told` holds what it was given: a trial's numbers may be corrected later, and are then told once more.
        Raises ValueError for a trial that was told before or has not ended.
        """
        with self.transaction() as sql:
            trial = self.trial(number)
            if trial.told is not None or trial.state not in TERMINAL:
                raise ValueError(f"trial {number} is {trial.state} and told as {trial.told}; an ended trial is told once")
            place = sql.execute("SELECT count(told) FROM trials").fetchone()[0]
            sql.execute("UPDATE trials SET told = ? WHERE number = ?", (place, number))
            self.event("told", trial=number, results=trial.results, noise=trial.noise)
            self._keep_snapshot(sql, snapshot)
            return place

    def untold(self) -> list[Trial]:
        """What the optimizer has not heard of yet, ended or not, in order of number."""
        return [_trial(row) for row in self.rows("SELECT * FROM trials WHERE told IS NULL ORDER BY number")]

    def told(self) -> list[Trial]:
        """In the order in which the optimizer heard of them: the same answers in it give the same questions."""
        return [_trial(row) for row in self.rows("SELECT * FROM trials WHERE told IS NOT NULL ORDER BY told")]

    def _keep_snapshot(self, sql: sqlite3.Connection, snapshot: str | None) -> None:
        if snapshot is not None:
            sql.execute("INSERT INTO snapshots (state, created) VALUES (?, ?)", (snapshot, self.clock()))
            sql.execute("DELETE FROM snapshots WHERE id <= (SELECT max(id) FROM snapshots) - ?", (KEPT_SNAPSHOTS,))

    def snapshot(self) -> str | None:
        """The optimizer's newest state, as text (JSON)."""
        found = self.rows("SELECT state FROM snapshots ORDER BY id DESC LIMIT 1")
        return found[0]["state"] if found else None

    # --- devices, events, artefacts --------------------------------------------------------------------------------

    def device(self, record: DeviceRecord) -> DeviceRecord:
        """What is stored under this name, else the given. Raises StoreError where its fidelity is another."""
        found = self.rows("SELECT * FROM devices WHERE name = ?", record.name)
        if not found:
            return self.put_device(record)
        stored = DeviceRecord(**dict(found[0]))
        if stored.fidelity != record.fidelity:
            raise StoreError(f"device {record.name} was of fidelity {stored.fidelity} in this sweep and is now "
                             f"{record.fidelity}; the two are never mixed: take another output directory")  # fmt: skip
        return replace(stored, device_class=record.device_class)

    def put_device(self, record: DeviceRecord) -> DeviceRecord:
        values = asdict(record)
        with self.transaction() as sql:
            sql.execute(f"INSERT OR REPLACE INTO devices ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                        tuple(values.values()))  # fmt: skip
        return record

    def devices(self) -> list[DeviceRecord]:
        return [DeviceRecord(**dict(row)) for row in self.rows("SELECT * FROM devices ORDER BY name")]

    def event(
        self, kind: str, *, trial: int | None = None, job: int | None = None, device: str | None = None, **detail: Any
    ) -> None:
        with self.transaction() as sql:
            sql.execute("INSERT INTO events (time, kind, trial, job, device, detail) VALUES (?, ?, ?, ?, ?, ?)",
                        (self.clock(), kind, trial, job, device, json.dumps(detail)))  # fmt: skip

    def events(self, kind: str | None = None) -> list[Event]:
        found = self.rows("SELECT time, kind, trial, job, device, detail FROM events WHERE kind = coalesce(?, kind)"
                          " ORDER BY id", kind)  # fmt: skip
        return [Event(**{**dict(row), "detail": json.loads(row["detail"])}) for row in found]

    def put_artefact(self, path: Path, kind: str, trial: int | None = None) -> Artefact:
        """Remember a finished file by its content."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        made = Artefact(digest, kind, str(path), path.stat().st_size, trial)
        with self.transaction() as sql:
            sql.execute("INSERT OR REPLACE INTO artefacts VALUES (?, ?, ?, ?, ?, ?)", (*asdict(made).values(), self.clock()))
        return made

    def artefact(self, *, sha256: str | None = None, kind: str | None = None, trial: int | None = None) -> Artefact | None:
        """By content, or by what it is of which trial; None where the file is no longer there in that size."""
        found = self.rows("SELECT * FROM artefacts WHERE sha256 = coalesce(?, sha256) AND kind = coalesce(?, kind) AND"
                          " (?3 IS NULL OR trial = ?3) ORDER BY created DESC", sha256, kind, trial)  # fmt: skip
        for row in found:
            made = Artefact(*tuple(row)[:5])
            if os.path.isfile(made.path) and os.path.getsize(made.path) == made.size:
                return made
        return None


def among(states: Sequence[State]) -> str:
    """A condition of SQL; always true of no states. They are our own words, never a user's."""
    return "1" if not states else f"state IN ({', '.join(repr(str(state)) for state in states)})"


def _trial(row: sqlite3.Row) -> Trial:
    results = None if row["results"] is None else json.loads(row["results"])
    plain = {key: row[key] for key in ("number", "key", "state", "reason", "duplicate_of", "told")}
    return Trial(**plain, config=json.loads(row["config"]), results=results, noise=json.loads(row["noise"]))


def _json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(dict(value))


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first setting that two specs do not share, down to its last name."""
    for key in sorted(found.keys() | wanted.keys()):
        one, other = found.get(key), wanted.get(key)
        if one != other and isinstance(one, Mapping) and isinstance(other, Mapping):
            return f"{key}.{_difference(one, other)}"
        if one != other:
            return f"{key} is {str(one)[:80]} there and {str(other)[:80]} here"
    return "a setting differs"
