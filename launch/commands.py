"""The commands that train: one stage, or the whole recipe."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from launch.cli import Parser
from launch.config import Recipe, load_recipe
from launch.ending import export_and_evaluate
from launch.rundir import open_run
from launch.runner import is_first, train_stages
from stages.config import STAGES, StageName
from stages.errors import InputError

logger = logging.getLogger(__name__)


def stage_command(stage: StageName, doc: str | None) -> None:
    """`launch/pretrain.py` and its sisters."""
    parser = Parser(doc)
    parser.add_argument("--init-from", metavar="RUN_OR_CHECKPOINT", help="the model to start from")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    options, overrides = parser.parse()
    recipe = load_recipe(options.recipe, overrides)
    directory = options.output_dir or Path("runs") / recipe.name
    goes_on = options.resume and any((directory / stage / "checkpoints").glob("step-*"))
    if options.init_from is None and stage != "pretrain" and not goes_on:
        raise InputError(f"{stage} starts from a trained model; name one with --init-from RUN_OR_CHECKPOINT")
    with open_run(recipe, directory, resume=options.resume):
        train_stages(recipe, directory, [stage], init_from=options.init_from)
        if is_first():
            _finish(directory)


def recipe_command(doc: str | None) -> None:
    """`launch/recipe.py`: the stages in order in one worker group, then export, evaluation, report."""
    parser = Parser(doc)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    parser.add_argument("--stages", metavar="A,B", help="only these stages of the recipe")
    parser.add_argument("--init-from", metavar="RUN_OR_CHECKPOINT", help="the model that the first stage starts from")
    options, overrides = parser.parse()
    recipe = load_recipe(options.recipe, overrides)
    names = _stage_names(recipe, options.stages)
    directory = options.output_dir or Path("runs") / recipe.name
    started = time.monotonic()
    with open_run(recipe, directory, resume=options.resume):
        init_from = options.init_from or _stage_before(recipe, directory, names[0])
        train_stages(recipe, directory, names, init_from=init_from)
        if not is_first():
            return
        _say(f"trained in {time.monotonic() - started:.0f} s")
        export_and_evaluate(recipe, directory)
        _finish(directory)
    _say(f"done in {time.monotonic() - started:.0f} s")


def _stage_names(recipe: Recipe, chosen: str | None) -> list[StageName]:
    names = list(recipe.stages())
    if not names:
        raise InputError(f"recipe {recipe.name} has no stage; give it at least pretrain")
    if chosen is None:
        return names
    wanted = [name for name in chosen.split(",") if name]
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"--stages {unknown[0]!r}; recipe {recipe.name} has {', '.join(names)}")
    if not wanted:
        raise InputError(f"--stages {chosen!r} names no stage; recipe {recipe.name} has {', '.join(names)}")
    return [name for name in STAGES if name in wanted]


def _stage_before(recipe: Recipe, directory: Path, first: StageName) -> str | None:
    """The folder of the last finished stage before `first`, where `first` needs one. Raises InputError for none."""
    if first == "pretrain":
        return None
    from stages.checkpoint import latest

    earlier = [name for name in recipe.stages() if STAGES.index(name) < STAGES.index(first)]
    stands = []
    for name in reversed(earlier):
        planned = recipe.stages()[name].steps
        wanted = min(planned, recipe.train.steps or planned)
        newest = latest(directory / name / "checkpoints")
        step = 0 if newest is None else int(newest.name.removeprefix("step-"))
        if step >= wanted:
            return str(directory / name)
        stands.append(f"{name} at step {step} of {wanted}")
    raise InputError(f"{first} starts from a trained model and {directory} has no finished stage before it "
                     f"({', '.join(reversed(stands)) or 'the recipe has none'}); run the earlier stages first, or use "
                     f"launch/{first}.py to start from another run")


def _finish(directory: Path) -> None:
    from launch.report import write_report

    _say(f"report: {write_report(directory)}")


def _say(text: str) -> None:
    """A line for the person at the terminal; commands print results to standard output and this to standard error."""
    sys.stderr.write(text + "\n")
