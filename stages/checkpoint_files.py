"""Checkpoint folders on disk: which ones count, how they are written durably and removed, what went wrong there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

COMMIT = "commit.json"
SHARDS = "*.safetensors"


def step_folders(root: str | Path) -> list[Path]:
    """Folders `step-NNNNNN` below `root`, committed or not, by step."""
    root = Path(root)
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def committed(root: str | Path) -> list[Path]:
    """Committed checkpoints below `root`, oldest first."""
    return [path for path in step_folders(root) if (path / COMMIT).is_file()]


def latest(root: str | Path) -> Path | None:
    """The committed checkpoint of the highest step below `root`."""
    found = committed(root)
    return found[-1] if found else None


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(file: Path) -> dict[str, Any]:
    """What `commit.json` says of a file."""
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def as_stored(tensor: Tensor) -> Tensor:
    """The shape on disk: safetensors readers cannot slice a scalar, so it is stored as one element. Shares storage."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


def remove(path: Path) -> None:
    """Delete a checkpoint. Its mark goes first: a removal that is cut short leaves nothing that looks whole."""
    if path.is_symlink():
        path.unlink()
        return
    (path / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(path)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that `path`, which need not exist, is or would be on; -1 where that cannot be told."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return -1


def causes(error: BaseException) -> list[BaseException]:
    """`error` and all that led to it, with what each rank said inside torch's CheckpointException."""
    return list(_walk(error, set()))


def _walk(item: Any, seen: set[int]) -> Iterator[BaseException]:
    if isinstance(item, tuple) and item:
        item = item[0]  # torch keeps (exception, traceback)
    if not isinstance(item, BaseException) or id(item) in seen:
        return
    seen.add(id(item))
    yield item
    failures = getattr(item, "failures", None)
    for other in (*(failures.values() if isinstance(failures, dict) else ()), item.__cause__, item.__context__):
        yield from _walk(other, seen)


def error_number(error: BaseException) -> int:
    """The operating system's number for what went wrong, 0 where it was not the system."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if "No space left" in str(cause) or "os error 28" in str(cause):  # how Rust's libraries say it
            return errno.ENOSPC
    return 0


def describe(error: BaseException) -> str:
    """One line: the first cause that is not torch's wrapper around it."""
    found = causes(error)
    cause = next((item for item in found if not hasattr(item, "failures")), found[0])
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
