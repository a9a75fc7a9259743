"""Writing checkpoints: shards first, the commit mark last, in a thread that training does not wait for.

The thread has a gloo group of its own: collectives of training and of saving, issued by two threads on one group,
would be matched with each other.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from stages.checkpoint_files import (
    COMMIT,
    as_stored,
    committed,
    describe,
    error_number,
    file_entry,
    free_bytes,
    latest,
    remove,
    step_folders,
    sync_folder,
    write_durably,
)
from stages.config import CheckpointConfig
from stages.errors import LostWorkerError, RunError

logger = logging.getLogger(__name__)

VERSION = 1
FAILURES = (OSError, RuntimeError, ValueError, KeyError, TypeError, IndexError, AssertionError, AttributeError,
            SafetensorError, CheckpointException)  # fmt: skip
"""What reading or writing a checkpoint may stumble on; CheckpointException is torch's, and not an Exception."""

# torch warns a process without a group that it takes it to be alone; here that is known.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class CheckpointWriter:
    """Writes `root/step-NNNNNN`; one save is under way at a time, and keeps the newest `config.keep`.

    Made by all ranks together. Folders that a killed run left uncommitted are removed.
    """

    def __init__(self, root: Path, config: CheckpointConfig, rank: int = 0, world: int = 1) -> None:
        self.root, self.config, self.rank, self.world = Path(root), config, rank, world
        self.group = dist.new_group(backend="gloo") if world > 1 else None
        self._pending: Future[None] | None = None
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=partial(_enter, device))
        if rank == 0:
            for path in step_folders(self.root):
                if not path.is_symlink() and not (path / COMMIT).is_file():
                    logger.warning("removing %s, whose writing was cut short", path)
                    self._retire(path)

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
        except RuntimeError as error:  # gloo's, of a collective that lost its peer
            raise LostWorkerError(f"checkpoint {path} was not written: a worker was lost ({describe(error)}); start again "
                           "with --resume") from error  # fmt: skip

    def _together(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do the work on every rank and merge what they return; an error on one is an error on all."""
        result: dict[str, Any] = {}
        problem: tuple[int, str, int] | None = None
        try:
            result = work()
        except FAILURES as error:
            problem = (error_number(error), describe(error), free_bytes(self.root))  # before anything is removed
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
                remove(path)
            path.mkdir(parents=True)
        return {}

    def _write_shards(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        own = path.glob(f"shard-{self.rank + 1:05d}-*.safetensors")
        return {file.name: file_entry(file) for file in own}

    def _commit(
        self, path: Path, files: dict[str, Any], documents: dict[str, dict[str, Any] | bytes]
    ) -> dict[str, Any]:
        seen = {file.name: file.stat().st_size for file in path.iterdir()}
        if seen != {name: entry["bytes"] for name, entry in files.items()}:
            raise RuntimeError(f"worker 0 sees other files in {path} than {self.world} workers wrote; expected one folder "
                               "that all machines share")  # fmt: skip
        for name, content in documents.items():
            file = path / (name if isinstance(content, bytes) else f"{name}.json")
            data = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
            write_durably(file, data)
            files[file.name] = file_entry(file)
        mark = json.dumps({"version": VERSION, "files": files}, indent=1).encode()
        write_durably(path / f"{COMMIT}.part", mark)
        (path / f"{COMMIT}.part").rename(path / COMMIT)
        sync_folder(path)
        sync_folder(self.root)
        for old in committed(self.root)[: -self.config.keep]:
            self._retire(old)
        return {}

    def _retire(self, old: Path) -> None:
        """Remove what is not needed; that it stays is no reason to end a run."""
        try:
            remove(old)
        except OSError as error:
            logger.warning("could not remove %s (%s)", old, error)

    def _explain(self, path: Path, error: _SaveError) -> str:
        last = latest(self.root)
        kept = f"the last checkpoint is {last.name}" if last else "there is no older one"
        if error.number in (errno.ENOSPC, errno.EDQUOT):
            return (f"checkpoint {path} was not written: the disk is full ({error.free} bytes free); "
                    f"{kept}; free some space and start again with --resume")
        return f"checkpoint {path} was not written ({error}); {kept}; start again with --resume"


class _SaveError(Exception):
    """The first problem that any rank had: errno or 0, one line, and the bytes that were free just then."""

    def __init__(self, number: int, text: str, free: int) -> None:
        super().__init__(text)
        self.number, self.free = number, free


def _enter(device: int | None) -> None:
    """A new thread is on GPU 0; on this process's own it makes no second context."""
    if device is not None:
        torch.cuda.set_device(device)


def _copy(tensor: Tensor) -> Tensor:
    """A snapshot on the CPU, so that the next optimizer step cannot reach what is being written."""
    tensor = as_stored(tensor.detach())
    if isinstance(tensor, DTensor) or tensor.device.type == "cpu":
        copy = tensor.clone(memory_format=torch.contiguous_format)  # safetensors writes contiguous tensors only
        return copy if copy.device.type == "cpu" else copy.cpu()
    return tensor.cpu().contiguous()
