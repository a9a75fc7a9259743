"""Writing checkpoints: shards first, the commit mark last, in a thread that training does not wait for.

The thread has a gloo group of its own: collectives of training and of saving, issued by two threads on one group,
would be matched with each other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from stages.config import CheckpointConfig
from stages.errors import RunError

logger = logging.getLogger(__name__)

COMMIT = "commit.json"
VERSION = 1


def committed(root: str | Path) -> list[Path]:
    """Committed checkpoints below `root`, oldest first."""
    root = Path(root)
    found = [path for path in root.glob("step-*") if path.name[5:].isdigit() and (path / COMMIT).is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest(root: str | Path) -> Path | None:
    found = committed(root)
    return found[-1] if found else None


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_stored(tensor: Tensor) -> Tensor:
    """The shape on disk: safetensors readers cannot slice a scalar, so it is stored as one element. Shares storage."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


class CheckpointWriter:
    """Writes `root/step-NNNNNN`; one save is under way at a time, and keeps the newest `config.keep`.

    Made by all ranks together. Folders that a killed run left uncommitted are removed.
    """

    def __init__(self, root: Path, config: CheckpointConfig, rank: int = 0, world: int = 1) -> None:
        self.root, self.config, self.rank, self.world = Path(root), config, rank, world
        self.group = dist.new_group(backend="gloo") if world > 1 else None
        self._pending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if rank == 0 and self.root.is_dir():
            for path in self.root.glob("step-*"):
                if not (path / COMMIT).is_file():
                    logger.warning("removing %s, whose writing was cut short", path)
                    shutil.rmtree(path)

    def save(self, step: int, tensors: Mapping[str, Tensor], documents: Mapping[str, dict[str, Any] | bytes]) -> None:
        """Take a copy of `tensors` now and write it, in the background where the config says so.

        Args:
            tensors: this rank's plain tensors and shards (DTensors), by global name.
            documents: name to JSON object (stored as `name.json`) or, under its own file name, to bytes.

        Raises RunError where this save, or the one before it, could not be written.
        """
        self.wait()
        copies = {name: _copy(tensor) for name, tensor in tensors.items()}
        work = partial(self._write, self.root / f"step-{step:06d}", copies, dict(documents))
        self._pending = self._thread.submit(work)
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Until nothing is under way. Raises RunError where the last save failed; on all ranks alike."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, path: Path, tensors: dict[str, Tensor], documents: dict[str, dict[str, Any] | bytes]) -> None:
        try:
            self._together(lambda: self._clear(path))
            files = self._together(lambda: self._write_shards(path, tensors))
            self._together(lambda: self._commit(path, files, documents) if self.rank == 0 else {})
        except _SaveError as error:
            if self.rank == 0:
                shutil.rmtree(path, ignore_errors=True)  # uncommitted, so nobody misses it; the cause is what is told
            raise RunError(self._explain(path, error)) from error

    def _together(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do the work on every rank and merge what they return; an error on one is an error on all."""
        result: dict[str, Any] = {}
        problem: tuple[int, str] | None = None
        try:
            result = work()
        except Exception as error:
            problem = (_error_number(error), _describe(error))
        if self.group is not None:
            everyone: list[Any] = [None] * self.world
            dist.all_gather_object(everyone, (result, problem), group=self.group)
            problem = next((item[1] for item in everyone if item[1] is not None), None)
            result = {name: value for part, _ in everyone for name, value in part.items()}
        if problem is not None:
            raise _SaveError(*problem)
        return result

    def _clear(self, path: Path) -> dict[str, Any]:
        if self.rank == 0:
            if path.exists():
                _remove(path)
            path.mkdir(parents=True)
        return {}

    def _write_shards(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        own = path.glob(f"shard-{self.rank + 1:05d}-*.safetensors")
        return {file.name: _entry(file) for file in own}

    def _commit(
        self, path: Path, files: dict[str, Any], documents: dict[str, dict[str, Any] | bytes]
    ) -> dict[str, Any]:
        for name, content in documents.items():
            file = path / (name if isinstance(content, bytes) else f"{name}.json")
            data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
            _write_durably(file, data)
            files[file.name] = _entry(file)
        unlisted = {file.name for file in path.iterdir()} - set(files)
        if unlisted:
            raise RuntimeError(f"{sorted(unlisted)[0]} was written by nobody")
        mark = json.dumps({"version": VERSION, "files": files}, indent=1).encode()
        _write_durably(path / f"{COMMIT}.part", mark)
        (path / f"{COMMIT}.part").rename(path / COMMIT)
        _sync_folder(path)
        for old in committed(self.root)[: -self.config.keep]:
            _remove(old)
        return {}

    def _explain(self, path: Path, error: _SaveError) -> str:
        last = latest(self.root)
        kept = f"the last checkpoint is {last.name}" if last else "there is no older one"
        if error.number in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.root if self.root.is_dir() else Path("/")).free
            return (f"checkpoint {path} was not written: the disk is full ({free / 2**20:.0f} MiB free); {kept}; "
                    "free some space and start again with --resume")
        return f"checkpoint {path} was not written ({error}); {kept}; start again with --resume"


class _SaveError(Exception):
    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


def _copy(tensor: Tensor) -> Tensor:
    """A snapshot on the CPU, so that the next optimizer step cannot reach what is being written."""
    tensor = as_stored(tensor.detach())
    if isinstance(tensor, DTensor) or tensor.device.type == "cpu":
        copy = tensor.clone()
        return copy if copy.device.type == "cpu" else copy.cpu()
    return tensor.cpu()


def _entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def _remove(path: Path) -> None:
    """Uncommit first: a removal that is cut short leaves nothing that looks whole."""
    (path / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(path)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, with what each rank said inside torch's CheckpointException."""
    found: list[BaseException] = []
    queue: list[Any] = [error]
    while queue:
        item = queue.pop(0)
        if isinstance(item, tuple) and item:
            item = item[0]  # torch keeps (exception, traceback)
        if isinstance(item, BaseException) and item not in found:
            found.append(item)
            failures = getattr(item, "failures", None)
            queue += [item.__cause__, item.__context__, *(failures.values() if isinstance(failures, dict) else ())]
    return found


def _error_number(error: BaseException) -> int:
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno:
            return cause.errno
        if "No space left" in str(cause) or "os error 28" in str(cause):
            return errno.ENOSPC
    return 0


def _describe(error: BaseException) -> str:
    cause = _causes(error)[-1]
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
