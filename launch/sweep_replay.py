"""`launch/sweep.py replay`: the optimizer of a sweep once more, from the sweep's database."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.sweep_config import SweepRecipe
from launch.sweep_optimizer import optimizer_maker
from launch.sweep_run import DATABASE, latency_plan, policy_of, sweep_plan
from search.budgets import answer_of
from search.database import StoreError
from search.jobs import JobQueue
from search.readings import KnownReadings
from search.replay import replay
from search.store import Store
from stages.errors import InputError, RunError


def replay_sweep(sweep: SweepRecipe, directory: Path, optimizer: str | None = None) -> str:
    """What to say of a sweep that asked what it would ask again. Raises RunError with the first difference, InputError."""
    if optimizer not in (None, sweep.optimizer):
        raise InputError(f"--optimizer {optimizer}: this sweep's is {sweep.optimizer}, and only its questions have answers; "
                         "another would ask for models that nobody measured or trained: start a sweep with "
                         f"--optimizer {optimizer}, or compare with benchmarks/search_front.py")  # fmt: skip
    import torch

    torch.set_num_threads(1)  # as in the search: sums in another order round differently
    space, plan = sweep.make_space(), sweep_plan(sweep)

    def make(planned: int, predict: Callable[..., Any]) -> Any:
        return optimizer_maker(sweep.optimizer)(space, replace(plan, trials=planned), predict)

    try:
        with closing(Store.read(directory / DATABASE)) as store:
            readings = KnownReadings(JobQueue(store), space, latency_plan(sweep), policy_of(sweep.device).times)
            found = replay(store, readings, plan.device_limits(), make, answer_of)
    except StoreError as error:
        raise InputError(str(error)) from None
    except ValueError as error:
        raise RunError(f"{directory}: {error}") from None
    done = f"{found.trials} trials in {found.questions} questions, {found.answers} answers"
    if found.difference is not None:
        raise RunError(f"{found.difference} (after {done}): other versions of the libraries, another number of threads, or "
                       "another machine may round differently")  # fmt: skip
    return f"the optimizer asks the same again: {done}"
