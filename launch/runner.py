"""From a recipe to running stages: which jobs, on which runner."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.config import LaunchConfig, Recipe
from launch.progress import follow_progress
from stages.config import StageName
from stages.errors import InputError

logger = logging.getLogger(__name__)


def train_stages(
    recipe: Recipe, directory: Path, names: Sequence[StageName], *, init_from: str | None, cache_dir: Path | None = None,
    progress: bool = True,
) -> None:  # fmt: skip
    """Run these stages, each from the one before, on the runner that the recipe asks for.

    `cache_dir` holds tokenised text, by default the run's own; many short runs over the same text share one.
    """
    jobs = build_jobs(recipe, directory, names, init_from=init_from, cache_dir=cache_dir)
    runner = choose_runner(recipe.launch)
    show = progress and is_first()
    with follow_progress(directory, {job["stage"]: job["config"].steps for job in jobs}, enabled=show):
        if runner == "ray":
            from launch.ray_runner import run_on_ray

            run_on_ray(jobs, recipe.launch, recipe.parallel.timeout_seconds)
        else:
            _run_here(jobs, recipe)


def build_jobs(
    recipe: Recipe, directory: Path, names: Sequence[StageName], *, init_from: str | None, cache_dir: Path | None = None
) -> list[dict[str, Any]]:
    """The fields of each stage's `StageJob`. The job itself is made in the worker: its module imports torch."""
    held_out = tuple((item, recipe.held_out_sources(item)) for item in recipe.train.held_out)
    tokenizer = recipe.tokenizer
    if init_from is not None:
        from stages.checkpoint import resolve

        checkpoint = resolve(Path(init_from))
        init_from = str(checkpoint.resolve())
        tokenizer = dataclasses.replace(tokenizer, path=str((checkpoint / "tokenizer.json").resolve()))
    jobs = []
    stages = recipe.stages()
    for name in names:
        if name not in stages:
            raise InputError(f"recipe {recipe.name} has no {name} stage; it has {', '.join(stages)}")
        config = stages[name]
        if recipe.train.steps is not None:
            config = dataclasses.replace(config, steps=recipe.train.steps)
        jobs.append(
            dict(
                stage=name, config=config, train=recipe.train, model=recipe.model, tokenizer=tokenizer,
                parallel=recipe.parallel, checkpoint=recipe.checkpoint, output_dir=str(directory.resolve()),
                cache_dir=str((cache_dir or directory / "data").resolve()), init_from=init_from, resume=True,
                run_name=f"{recipe.name}-{directory.name}", recipe_hash=recipe.hash(), wandb_mode=recipe.tracking.wandb,
                wandb_project=recipe.tracking.project, held_out=held_out, held_out_fraction=recipe.held_out_fraction(),
            )
        )  # fmt: skip
        init_from = str((directory / name).resolve())
    return jobs


def choose_runner(launch: LaunchConfig) -> str:
    """`ray` or `local`. Raises InputError where the recipe asks for what the command was not started for."""
    torchrun_world = int(os.environ.get("WORLD_SIZE", "0")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    if torchrun_world:
        if launch.runner == "ray":
            raise InputError("launch.runner=ray under torchrun; start the command with python, or set launch.runner=local")
        if torchrun_world != launch.workers:
            raise InputError(f"torchrun started {torchrun_world} processes, launch.workers={launch.workers}; make them equal")
        return "local"
    if launch.runner == "auto":
        return "ray" if launch.workers > 1 or os.environ.get("RAY_ADDRESS") else "local"
    if launch.runner == "local" and launch.workers > 1:
        raise InputError(f"launch.runner=local is one process, launch.workers={launch.workers}; "
                         f"use torchrun --nproc-per-node {launch.workers}, or launch.runner=ray")
    return launch.runner


def is_first() -> bool:
    """Whether this is the process that speaks and writes: torchrun starts the command once a worker."""
    return os.environ.get("RANK", "0") == "0"


def _run_here(jobs: list[dict[str, Any]], recipe: Recipe) -> None:
    import torch

    from launch.log_setup import set_up_logging
    from stages.distributed import init_process, shutdown
    from stages.run import StageJob, run_stages

    if recipe.launch.threads_per_worker:
        torch.set_num_threads(recipe.launch.threads_per_worker)
    set_up_logging(rank=int(os.environ.get("RANK", "0")), verbose=sys.stderr.isatty())
    try:
        run_stages([StageJob(**job) for job in jobs], init_process(timeout_seconds=recipe.parallel.timeout_seconds))
    finally:
        shutdown()
