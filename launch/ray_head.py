"""One Ray for several processes: a search's scoring processes train on the same cluster, or on the same local head."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError, RunError

if TYPE_CHECKING:
    from launch.config import LaunchConfig

ROOT = Path(__file__).resolve().parent.parent
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


def start_head(cpus: float, gpus: float) -> str:
    """A head on loopback that is gone with this process; its address. Raises RunError where it does not come up."""
    import ray

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # the head's workers inherit it
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address="local", num_cpus=max(1, math.ceil(cpus)), num_gpus=math.ceil(gpus) or None, include_dashboard=False,
                 object_store_memory=200 * 2**20, **QUIET)  # fmt: skip
    except Exception as error:  # ray raises bare Exception where its head does not come up in time
        raise RunError(f"Ray's local head did not start ({str(error).strip()[:200]}); the machine may be busy: start again "
                       "with --resume, or in this process with --launch.workers 1") from error
    return str(ray.get_runtime_context().gcs_address)


@contextmanager
def shared_cluster(launch: LaunchConfig, processes: int) -> Iterator[None]:
    """Room for `processes` trainings of `launch.workers` at once, on the cluster that RAY_ADDRESS names or a head of our own,
    which the processes that are started meanwhile find as RAY_ADDRESS. Nothing where training is no business of Ray.

    Raises InputError for a cluster that has less: trainings that wait for room would be given up after some minutes.
    """
    from launch.runner import choose_runner

    if choose_runner(launch) != "ray":
        yield
        return
    import ray

    count = processes * launch.workers
    mine = not ray.is_initialized()
    if os.environ.get("RAY_ADDRESS"):
        if mine:
            ray.init(**QUIET)
        try:
            _check_room(launch, processes)
            yield
        finally:
            if mine:
                ray.shutdown()
        return
    os.environ["RAY_ADDRESS"] = start_head(count * launch.cpus_per_worker, count * launch.gpus_per_worker)
    try:
        yield
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()


def _check_room(launch: LaunchConfig, processes: int) -> None:
    import ray

    have = ray.cluster_resources()
    for name, each in (("CPU", launch.cpus_per_worker), ("GPU", launch.gpus_per_worker)):
        need = processes * launch.workers * each
        if need > have.get(name, 0):
            raise InputError(f"quality.processes={processes} trainings of {launch.workers} workers need {need:g} {name}s at "
                             f"once, the cluster has {have.get(name, 0):g}; lower quality.processes, or add nodes")
