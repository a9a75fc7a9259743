"""The agent's files, named by their SHA-256: sent once, checked whole, the least recently used dropped first."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path

from search.agent.protocol import SHA256, ProtocolError


class ContentCache:
    """A folder of at most `limit` bytes. Threads may share it; two agents may not."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for half in folder.glob("*.part"):
            half.unlink()

    def get(self, sha256: str) -> Path | None:
        """The file, now the most recently used; None where it is not held."""
        path = self.folder / sha256
        with self._lock:
            if not path.is_file():
                return None
            os.utime(path)
            return path

    def add(self, sha256: str, size: int, offset: int, data: bytes) -> tuple[bool, int]:
        """Append to a file being sent: (whether it is whole now, bytes held of it). Raises ProtocolError.

        A sender whose connection broke asks with no data and goes on from what is held.
        """
        if size > self.limit:
            raise ProtocolError(f"a file of {size} bytes; this agent's cache holds {self.limit}")
        part, path = self.folder / f"{sha256}.part", self.folder / sha256
        with self._lock:
            if path.is_file():
                return True, size
            held = part.stat().st_size if part.is_file() else 0
            if data and offset != held:
                raise ProtocolError(f"offset={offset}; {held} bytes are held, send from there")
            if held + len(data) > size:
                part.unlink(missing_ok=True)
                raise ProtocolError(f"more than the {size} bytes announced; nothing of it was kept")
            if held == 0 and data:
                self._make_room(size)
            if data:
                with part.open("ab") as file:
                    file.write(data)
            if held + len(data) < size:
                return False, held + len(data)
            return self._complete(sha256, part, path), size

    def _complete(self, sha256: str, part: Path, path: Path) -> bool:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise ProtocolError(f"the file's SHA-256 is {found}, announced was {sha256}; nothing of it was kept")
        part.replace(path)
        return True

    def _make_room(self, size: int) -> None:
        whole = [path for path in self.folder.iterdir() if SHA256.fullmatch(path.name)]
        held = sorted(whole, key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in held)
        for path in held:
            if total + size <= self.limit:
                break
            total -= path.stat().st_size
            path.unlink()  # a program that has it mapped keeps it
        if shutil.disk_usage(self.folder).free < size:
            raise ProtocolError(f"a file of {size} bytes; the disk under {self.folder.name} has not that much left")
