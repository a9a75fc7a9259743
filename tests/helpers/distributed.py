"""Run a function in several gloo processes and get back what each returned, or the first one's error."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def run_distributed(
    function: Callable[..., Any], world: int = 2, *, args: tuple[Any, ...] = (), timeout_s: float = 120.0,
    backend: str = "gloo",
) -> list[Any]:  # fmt: skip
    """`function(*args, rank, world)` in `world` new processes with a process group; the results by rank.

    `function` must be importable by name (top level of a test module). An exception in any process ends all of them
    and is raised here as RuntimeError with that process's traceback; so is a process that dies, or the time-out.
    """
    context = _context()
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        context.Process(target=_entry, args=(function, args, rank, world, environment, backend, answers),
                        daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < world:
            try:
                rank, result, error = answers.get(timeout=0.5)
            except queue.Empty:
                dead = [(rank, p.exitcode) for rank, p in enumerate(processes) if p.exitcode and rank not in results]
                if dead:
                    raise RuntimeError(f"rank {dead[0][0]} ended with exit code {dead[0][1]}") from None
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{function.__name__} on {world} processes took over {timeout_s} s") from None
                continue
            if error is not None:
                raise RuntimeError(f"rank {rank}:\n{error}")
            results[rank] = result
        for process in processes:
            process.join(timeout=10)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]


def _context() -> Any:
    """New processes are forked from one clean process that has imported torch, which takes seconds, once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint"])
    return context


def _entry(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, environment: dict[str, str],
    backend: str, answers: Any,
) -> None:  # fmt: skip
    os.environ.clear()  # what the server was started with; this is what the caller has now
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if world > 1:
            dist.init_process_group(backend)
        result = function(*args, rank, world)
        answers.put((rank, result, None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
