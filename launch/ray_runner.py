"""Training on Ray Train: one worker group runs all stages it is given.

The start is arranged so that nothing heavy happens twice or in a row (figures in `docs/log.md`):
- the driver and Ray's controller never import torch: the process group is joined by our own `Backend`, in the workers;
- Ray Train is imported while the local head comes up;
- the autoscaling coordinator, for which the controller waits up to five seconds, is asked for before it is needed.
Ray is spoken here only; the stages see `stages.distributed.Process`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ray_head import QUIET, start_head
from stages.errors import InputError, LostWorkerError, NonFiniteError, RunError

if TYPE_CHECKING:
    from launch.config import LaunchConfig

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a report waits for the controller's poll; 2 s by default
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in every process
}
REPORTED = (NonFiniteError, RunError, InputError)
"""What a worker's own line is raised again as, the narrowest first."""
LOCAL_HEAD_ENVIRONMENT = {
    # Actors and exporters that watch a shared cluster; each costs a process that imports Ray Train.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
}


def run_on_ray(jobs: list[dict[str, Any]], launch: LaunchConfig, timeout_seconds: float) -> None:
    """Run the stages on a worker group of `launch.workers`; a lost worker restarts the group from its last checkpoint.

    Raises InputError or RunError with the worker's own line, whichever worker it came from.
    """
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.update(LOCAL_HEAD_ENVIRONMENT)
    with _cluster(launch):
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from launch.ray_backend import GroupConfig, LeanTrainer

        key = f"pocketforge-error-{uuid.uuid4().hex}"
        resources = {"CPU": launch.cpus_per_worker}
        if launch.gpus_per_worker:
            resources["GPU"] = launch.gpus_per_worker
        trainer = LeanTrainer(
            _worker,
            train_loop_config={"jobs": jobs, "error_key": key, "timeout_seconds": timeout_seconds, "launch": launch},
            backend_config=GroupConfig(),
            scaling_config=ScalingConfig(
                num_workers=launch.workers,
                use_gpu=launch.gpus_per_worker > 0,
                resources_per_worker=resources,
                placement_strategy="SPREAD" if launch.nodes > 1 else "PACK",
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(Path(jobs[0]["output_dir"]).resolve()),
                failure_config=FailureConfig(max_failures=launch.max_failures),
            ),
        )
        _fit(trainer, key, launch)


def _fit(trainer: Any, key: str, launch: LaunchConfig) -> None:
    try:
        trainer.fit()
    except Exception as error:
        _raise_reported(key)
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise RunError(
            f"the worker group failed after {launch.max_failures} restarts ({cause[-1][:300]}); "
            "its logs are under the run's ray/ folder and Ray's session folder; start again with --resume"
        ) from error
    _raise_reported(key)


def _raise_reported(key: str) -> None:
    """Raise what a worker left for us; Ray itself would only say that a worker failed, and try again."""
    if (found := _kv_get(key)) is not None:
        raise next(kind for kind in REPORTED if kind.__name__ == found["kind"])(found["message"])


def _kv_get(key: str) -> dict[str, str] | None:
    from ray.experimental.internal_kv import _internal_kv_get

    raw = _internal_kv_get(key)
    return json.loads(raw) if raw else None


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    import ray
    import torch
    from ray.experimental.internal_kv import _internal_kv_put

    from launch.log_setup import set_up_logging
    from stages.distributed import init_process, shutdown
    from stages.run import StageJob, run_stages

    launch: LaunchConfig = config["launch"]
    key = config["error_key"]
    if _kv_get(key) is not None:
        return  # a restarted group must not repeat what cannot succeed
    context = ray.train.get_context()
    torch.set_num_threads(launch.threads_per_worker or max(1, int(launch.cpus_per_worker)))
    set_up_logging(rank=context.get_world_rank())
    try:
        process = init_process(timeout_seconds=config["timeout_seconds"])
        nodes = context.get_node_rank() + 1
        if launch.nodes and context.get_world_rank() == context.get_world_size() - 1 and nodes != launch.nodes:
            raise InputError(f"launch.nodes={launch.nodes} but Ray placed the workers on {nodes} nodes; "
                             "add nodes, or set launch.nodes=0 to leave the placement to Ray")
        run_stages([StageJob(**job) for job in config["jobs"]], process)
    except LostWorkerError:
        raise  # Ray starts the group again
    except (InputError, RunError, ValueError) as error:
        if not isinstance(error, InputError | RunError) and type(error).__module__.partition(".")[0] not in _OURS:
            raise
        kind = next((kind for kind in REPORTED if isinstance(error, kind)), InputError)
        _internal_kv_put(key, json.dumps({"kind": kind.__name__, "message": str(error)}).encode(), overwrite=False)
    except Exception:
        if _kv_get(key) is None:  # else: a peer left, and said why
            raise
    finally:
        shutdown()


_OURS = {"modeling", "data_pipeline", "stages", "quant", "kernels", "launch", "search"}


@contextlib.contextmanager
def _cluster(launch: LaunchConfig) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), or start a local head and take it down again."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # a local head's workers inherit it
    import ray

    def import_ray_train() -> None:
        # Held by the import system's lock, so the main thread's own import simply waits for this one.
        import ray.train.v2.api.data_parallel_trainer  # noqa: F401

    importer = threading.Thread(target=import_ray_train, name="import-ray-train")
    importer.start()
    mine = not ray.is_initialized()  # a search that has devices in actors is connected already
    try:
        if not os.environ.get("RAY_ADDRESS"):
            start_head(launch.workers * launch.cpus_per_worker, launch.workers * launch.gpus_per_worker)
        elif mine:
            ray.init(**QUIET)
    finally:
        importer.join()
    if os.environ.get("RAY_ADDRESS"):
        _check_fits(launch)
    try:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            get_or_create_autoscaling_coordinator,
        )

        get_or_create_autoscaling_coordinator()
        yield
    finally:
        if mine:
            ray.shutdown()


def _check_fits(launch: LaunchConfig) -> None:
    import ray

    have = ray.cluster_resources()
    for name, need in (("CPU", launch.workers * launch.cpus_per_worker), ("GPU", launch.workers * launch.gpus_per_worker)):
        if need > have.get(name, 0):
            raise InputError(
                f"launch.workers={launch.workers} need {need:g} {name}s, the cluster has {have.get(name, 0):g}; "
                f"lower launch.workers or launch.{name.lower()}s_per_worker, or add nodes"
            )
