"""One SQLite file with one writer: the lock, the connection, transactions. What is in it is search/store.py's.

WAL mode lets readers go on while the writer commits. The lock belongs to a process and goes with it, also after kill -9.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from search.schema import check_ours, migrate

BUSY_S = 60.0


class StoreError(ValueError):
    """The database is in use, is damaged, or is not this sweep's."""


class Database:
    """A connection that threads share; the writer's has the lock."""

    def __init__(self, path: Path, *, writer: bool) -> None:
        self.path = path
        self._file_lock = writer_lock(path) if writer else None
        self._lock, self._depth = threading.RLock(), 0
        try:
            self._connection = connect(path, writer=writer)
        except BaseException:
            self._release()
            raise

    def close(self) -> None:
        """Not under another thread's statement, which would crash the process; what comes after it raises ProgrammingError."""
        with self._lock:
            self._connection.close()
        self._release()

    def _release(self) -> None:
        if self._file_lock is not None:
            self._file_lock.release()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, on disk when it ends; one inside another is part of the outer one."""
        with self._lock:
            if self._depth == 0:
                self._connection.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self._connection
            except BaseException:
                self._depth -= 1
                if self._depth == 0:
                    self._connection.execute("ROLLBACK")
                raise
            self._depth -= 1
            if self._depth == 0:
                self._connection.execute("COMMIT")

    def rows(self, query: str, *arguments: Any) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, arguments).fetchall()


def writer_lock(path: Path) -> FileLock:
    """Raises StoreError. The note beside the lock only says whose it is."""
    lock, note = FileLock(f"{path}.lock", thread_local=False), Path(f"{path}.writer")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = note.read_text(encoding="utf-8") if note.is_file() else "another process"
        raise StoreError(f"{path} is written by {holder}; wait for it or stop it (readers are free)") from None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    note.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}", encoding="utf-8")
    return lock


def connect(path: Path, *, writer: bool = True) -> sqlite3.Connection:
    mode = "rwc" if writer else "ro"
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None,
                                     check_same_thread=False)  # fmt: skip
        connection.row_factory = sqlite3.Row
        if writer:
            check_ours(connection, str(path))  # first of all: another program's file is left as it is
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut the last moments at most
            connection.execute("PRAGMA foreign_keys = ON")
            migrate(connection)
        else:
            connection.execute("SELECT spec_hash FROM sweeps")
    except sqlite3.Error as error:
        raise StoreError(f"{path}: not a readable database of a sweep ({error}); expected one that this program made") from None
    except ValueError as error:
        raise StoreError(str(error)) from None
    return connection
