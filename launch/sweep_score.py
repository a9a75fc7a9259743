"""What a scoring process of a search runs: `python -m search.workers launch.sweep_score:score`.

The process gets plain JSON: the sweep's file, the backbone and a candidate. It builds its training once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from launch.config import read_toml
from launch.runner import choose_runner
from launch.search_quality import PrunedTraining
from launch.sweep_config import SweepRecipe, from_dict
from launch.sweep_supernet import supernet_quality
from search.quality import TrainedScorer, as_score
from search.turns import Turns
from search.workers import ProcessScorer, Score
from stages.errors import InputError


class CandidateScorer:
    """A `Score` behind a process of its own; see the module."""

    def __init__(self, sweep_file: Path, backbone: Path, importance: Path, folder: Path) -> None:
        log = folder.parent / f"{folder.name}.log"  # a table is on the terminal, which lines of a training would tear apart
        self.process = ProcessScorer("launch.sweep_score:score", log=log)
        self.task = [str(path.resolve()) for path in (sweep_file, backbone, importance, folder)]

    def __call__(self, candidate: Mapping[str, Any]) -> Mapping[str, float]:
        return self.process({"task": self.task, "candidate": dict(candidate)})

    def close(self) -> None:
        self.process.close()


def score(request: Mapping[str, Any]) -> Mapping[str, float]:
    """Raises Infeasible for the candidate's own faults, RuntimeError for what asking again may mend."""
    try:
        with _turn(request["task"][0]):
            return _scorer(*request["task"])(request["candidate"])
    except InputError as error:  # of the backbone or the data, not of this candidate: never a verdict on it
        raise RuntimeError(str(error)) from None


def turns_of(sweep: SweepRecipe, directory: Path) -> Turns | None:
    """What this process computes with and measures by, where this machine does both (search/turns.py)."""
    here = "local" in sweep.device.names and choose_runner(sweep.recipe.launch) == "local"
    return Turns(directory) if here else None


@cache
def _turns(sweep_file: str) -> Turns | None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    turns = turns_of(from_dict(read_toml(Path(sweep_file)), sweep_file), Path(sweep_file).parent)
    if turns is not None:
        register_optimizer_step_post_hook(lambda *_: turns.give())  # a training gives way at each of its steps
    return turns


def _turn(sweep_file: str) -> AbstractContextManager[None]:
    turns = _turns(sweep_file)
    return nullcontext() if turns is None else turns.computing()


@cache
def _scorer(sweep_file: str, backbone: str, importance: str, folder: str) -> Score:
    sweep = from_dict(read_toml(Path(sweep_file)), sweep_file)
    space, quality = sweep.make_space(), sweep.quality
    if quality.source == "supernet":
        training: Any = supernet_quality(sweep, Path(backbone))
    else:
        if quality.source == "scratch":
            backbone = importance = ""
        training = PrunedTraining(
            recipe=sweep.recipe, backbone=backbone, folder=folder, importance=importance, variant=quality.variant,
            layers=quality.layers, held_out=quality.held_out,
        )  # fmt: skip
    return as_score(TrainedScorer(training), lambda flat: space.to_config(space.unflatten(flat)), quality.budget_tokens,
                    sweep.seed)  # fmt: skip
