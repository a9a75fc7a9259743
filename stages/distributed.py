"""The process group as the stages see it: rank, world, device, and a few collectives that also work alone.

A stage runs the same under Ray Train, torchrun and alone: all three hand over the environment of `env://`. A single
process has no process group, and every collective here is then the identity.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """One of `world` processes of a run, and the device it computes on."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def init_process(backend: str | None = None, timeout_seconds: float = 300.0) -> Process:
    """Join the process group that RANK, WORLD_SIZE and MASTER_ADDR describe; a world of one needs none.

    Args:
        backend: `gloo` or `nccl`; None takes nccl where there is a GPU for it. CPU tensors always go over gloo.
        timeout_seconds: how long a collective waits for a lost worker before it fails.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if backend != "gloo" and torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if device.type == "cpu":
        keep_freed_memory()
    if not dist.is_initialized() and world > 1:
        both = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(both, timeout=timedelta(seconds=timeout_seconds))
    if dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size(), local_rank, device)
    return Process(0, 1, local_rank, device)


def keep_freed_memory() -> bool:
    """Tell glibc to keep what tensors free for the next ones; returns whether it will. Elsewhere nothing changes.

    By default a large tensor is a new mapping, zeroed page by page by the kernel at its first touch: thousands of page
    faults a training step, 2 to 7 % of its time (docs/log.md). The process keeps its peak instead.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    mmap_threshold, trim_threshold = -3, -1  # malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30)) and bool(mallopt(trim_threshold, 2**31 - 1))


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(values: torch.Tensor, process: Process) -> torch.Tensor:
    """The sum of `values` over all processes, in place."""
    if process.world > 1:
        dist.all_reduce(values)
    return values


def barrier(process: Process) -> None:
    """Wait for all processes."""
    if process.world > 1:
        dist.barrier()


def on_first(work: Callable[[], T], process: Process) -> T:
    """Do `work` on rank 0 and give every rank its result, or its error: what a file system says is decided once."""
    if process.world == 1:
        return work()
    box: list[Any] = [None]
    if process.is_first:
        try:
            box = [(work(), None)]
        except Exception as problem:
            box = [(None, problem)]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    result, error = box[0]
    if error is not None:
        raise error
    return result
