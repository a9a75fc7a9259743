"""Sharded checkpoints: finding, checking and reading them. `stages/checkpoint_writer.py` writes them.

A checkpoint is a folder `step-NNNNNN`: safetensors shards as `torch.distributed.checkpoint` lays them out (each rank
wrote its own; any number of ranks can read them), JSON documents, `tokenizer.json`, and last of all `commit.json`,
which lists every file with its size and SHA-256. A folder without it does not exist, for anybody. Nothing in it is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stages.checkpoint_files import COMMIT, SHARDS, as_stored, committed, describe, file_hash, latest
from stages.checkpoint_writer import FAILURES, CheckpointWriter
from stages.config import STAGES
from stages.errors import CheckpointError

__all__ = [
    "CheckpointWriter", "committed", "latest", "load_full", "load_tensors", "read_document", "resolve", "tensor_names",
    "verify",
]  # fmt: skip

DAMAGED = "the checkpoint is damaged: restore the file, or resume from an older checkpoint"


def resolve(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, a stage's newest, or the newest of a run's last stage that has one.

    Raises CheckpointError that says what is there instead.
    """
    path = Path(path)
    if (path / COMMIT).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected a run, a stage or a checkpoint folder")
    if re.fullmatch(r"step-\d+", path.name):
        others = [found.name for found in committed(path.parent)]
        raise CheckpointError(f"{path} was not committed (it has no {COMMIT}): its writing was cut short; "
                              f"committed beside it: {', '.join(others) or 'none'}")
    for folder in (path, path / "checkpoints", *(path / stage / "checkpoints" for stage in reversed(STAGES))):
        if (found := latest(folder)) is not None:
            return found
    raise CheckpointError(f"{path} holds no committed checkpoint; expected a run, a stage or a checkpoint folder")


def verify(path: Path, rank: int = 0, world: int = 1) -> None:
    """Check presence, size and hash of every file, the work shared by the ranks; all ranks raise what one finds."""
    problem = _first_problem(path, rank, world)
    if world > 1 and dist.is_initialized():
        found: list[Any] = [None] * world
        dist.all_gather_object(found, problem)
        problem = next((item for item in found if item is not None), None)
    if problem is not None:
        raise CheckpointError(problem)


def _first_problem(path: Path, rank: int, world: int) -> str | None:
    try:
        files = _commit_files(path)
    except CheckpointError as error:
        return str(error)
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing; {DAMAGED}"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, {entry['bytes']} were written; {DAMAGED}"
    for file in path.glob(SHARDS):  # all that is there would be read
        if file.name not in files:
            return f"{file} is not in its commit.json; take it away, or resume from an older checkpoint"
    for name in sorted(files)[rank::world]:
        if file_hash(path / name) != files[name]["sha256"]:
            return f"{path / name} is not what was written (SHA-256 differs); {DAMAGED}"
    return None


def _commit_files(path: Path) -> dict[str, dict[str, Any]]:
    """The files of `commit.json`, itself untrusted: names of this folder only, with a size and a hash."""
    try:
        files = json.loads((path / COMMIT).read_text(encoding="utf-8"))["files"]
        good = all(
            Path(name).name == name and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise CheckpointError(f"{path / COMMIT} is missing or damaged; the checkpoint does not count: use another")
    return files


def read_document(path: Path, name: str) -> dict[str, Any]:
    """The JSON document `name` of a checkpoint, checked against the commit."""
    file = path / f"{name}.json"
    entry = _commit_files(path).get(file.name)
    if entry is None:
        raise CheckpointError(f"{path} has no document {name}; expected a training checkpoint")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); the checkpoint is damaged") from None
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{file} is not what was written (SHA-256 differs); the checkpoint is damaged")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(f"{file} is not a JSON object; the checkpoint is damaged")
    return document


def tensor_names(path: Path) -> list[str]:
    """Names of all tensors, from the shards' headers."""
    with _reading(path):
        return sorted(_headers(path))


def load_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` (plain, or DTensors of any sharding) in place. Call on all ranks; `verify` comes before.

    Raises CheckpointError for a tensor that the checkpoint lacks or holds in another shape.
    """
    with _reading(path):
        known = _headers(path)
        for name, tensor in tensors.items():
            if name not in known:
                raise CheckpointError(f"{path} has no tensor {name}; it is of another model")
            wanted, held = tuple(as_stored(tensor).shape), tuple(known[name].size)
            if wanted != held:
                raise CheckpointError(f"{path}: {name} is {held}, the model has {wanted}; it is of another model")
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        targets = {name: as_stored(tensor) for name, tensor in tensors.items()}
        dcp.load(targets, storage_reader=_reader(path), no_dist=alone)


def load_full(path: Path, prefix: str = "model.") -> dict[str, Tensor]:
    """Whole tensors whose name starts with `prefix` (taken off), in this process alone."""
    with _reading(path):
        known = _headers(path)
        full = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in known.items() if name.startswith(prefix)
        }  # fmt: skip
        dcp.load(full, storage_reader=_reader(path), no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in full.items()}


def _reader(path: Path) -> dcp.HuggingFaceStorageReader:
    return dcp.HuggingFaceStorageReader(str(path))


def _headers(path: Path) -> dict[str, TensorStorageMetadata]:
    found = _reader(path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A damaged shard shows as whatever its reader stumbled on; say which checkpoint it was."""
    try:
        yield
    except CheckpointError:
        raise
    except FAILURES as error:
        raise CheckpointError(f"{path} cannot be read ({describe(error)}); the checkpoint is damaged") from error
