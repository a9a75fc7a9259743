"""The database's tables, as a list of migrations: a file of an older version is brought up to date when it is opened."""

from __future__ import annotations

import sqlite3

from search.records import STATES, TERMINAL

APPLICATION_ID = 0x504F4B54
"""SQLite's mark of whose file it is."""

_ALL, _ENDED = (", ".join(f"'{state}'" for state in states) for states in (STATES, TERMINAL))

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE sweeps (id INTEGER PRIMARY KEY CHECK (id = 1), spec_hash TEXT NOT NULL, spec TEXT NOT NULL,"
        " phase TEXT NOT NULL, created REAL NOT NULL)",
        "CREATE TABLE trials (number INTEGER PRIMARY KEY, key TEXT NOT NULL, config TEXT NOT NULL,"
        f" state TEXT NOT NULL CHECK (state IN ({_ALL})), results TEXT, noise TEXT NOT NULL DEFAULT '{{}}',"
        " reason TEXT NOT NULL DEFAULT '', duplicate_of INTEGER REFERENCES trials, told INTEGER UNIQUE, created REAL NOT NULL,"
        f" ended REAL, CHECK ((state IN ({_ENDED})) = (ended IS NOT NULL)), CHECK ((state = 'ok') = (results IS NOT NULL)))",
        "CREATE INDEX trials_by_key ON trials (key)",
        "CREATE TABLE jobs (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,"
        " trial INTEGER REFERENCES trials, device_class TEXT NOT NULL, payload TEXT NOT NULL,"
        f" state TEXT NOT NULL CHECK (state IN ({_ALL})), attempts INTEGER NOT NULL DEFAULT 0,"
        " postponed INTEGER NOT NULL DEFAULT 0, fence INTEGER NOT NULL DEFAULT 0, device TEXT, lease_until REAL,"
        " not_before REAL NOT NULL DEFAULT 0, avoid TEXT NOT NULL DEFAULT '[]', results TEXT, reason TEXT NOT NULL DEFAULT '',"
        " replaces INTEGER REFERENCES jobs, created REAL NOT NULL, ended REAL,"
        f" CHECK ((state IN ({_ENDED})) = (ended IS NOT NULL)), CHECK ((state = 'ok') = (results IS NOT NULL)),"
        " CHECK ((state = 'running') = (lease_until IS NOT NULL)))",
        "CREATE INDEX jobs_by_state ON jobs (state, kind, device_class)",
        "CREATE INDEX jobs_by_trial ON jobs (trial)",
        "CREATE TABLE measurements (id INTEGER PRIMARY KEY, job INTEGER NOT NULL REFERENCES jobs, role TEXT NOT NULL,"
        " fence INTEGER NOT NULL, device TEXT NOT NULL, fidelity TEXT NOT NULL, status TEXT NOT NULL, results TEXT NOT NULL,"
        " errors TEXT NOT NULL, samples TEXT NOT NULL, output_hash TEXT, sentinel_ratio REAL, started REAL NOT NULL,"
        " ended REAL NOT NULL, detail TEXT NOT NULL)",
        "CREATE UNIQUE INDEX one_result_a_job ON measurements (job) WHERE role = 'result'",
        "CREATE TABLE devices (name TEXT PRIMARY KEY, device_class TEXT NOT NULL, fidelity TEXT NOT NULL, state TEXT NOT NULL,"
        " failures INTEGER NOT NULL, step INTEGER NOT NULL, until REAL NOT NULL, baseline REAL, sentinel REAL,"
        " checked REAL NOT NULL, jobs_since INTEGER NOT NULL, reason TEXT NOT NULL)",
        "CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, trial INTEGER, job INTEGER,"
        " device TEXT, detail TEXT NOT NULL)",
        "CREATE TABLE artefacts (sha256 TEXT PRIMARY KEY, kind TEXT NOT NULL, path TEXT NOT NULL, size INTEGER NOT NULL,"
        " trial INTEGER, created REAL NOT NULL)",
        "CREATE TABLE snapshots (id INTEGER PRIMARY KEY, state TEXT NOT NULL, created REAL NOT NULL)",
    ),
)


def check_ours(connection: sqlite3.Connection, path: str) -> None:
    """Raises ValueError for a file that another program, or a newer one, made."""
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    mark = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if mark != APPLICATION_ID and tables:
        raise ValueError(f"{path} is a database of another program; expected a sweep's or no file")
    if found > len(MIGRATIONS):
        raise ValueError(f"{path} is of version {found}, this program knows up to {len(MIGRATIONS)}; update the program")


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the file to the newest version, one transaction a version."""
    for version in range(connection.execute("PRAGMA user_version").fetchone()[0], len(MIGRATIONS)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            for statement in MIGRATIONS[version]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
