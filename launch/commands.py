"""The commands that train: one stage, or the whole recipe."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli import Parser
from launch.config import EvaluationConfig, Recipe, load_recipe
from launch.rundir import open_run, write_json
from launch.runner import is_first, train_stages
from stages.config import STAGES, StageName
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.loading import LoadedModel

logger = logging.getLogger(__name__)


def stage_command(stage: StageName, doc: str | None) -> None:
    """`launch/pretrain.py` and its sisters."""
    parser = Parser(doc)
    parser.add_argument("--init-from", metavar="RUN_OR_CHECKPOINT", help="the model to start from")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    options, overrides = parser.parse()
    recipe = load_recipe(options.recipe, overrides)
    if options.init_from is None and stage != "pretrain":
        raise InputError(f"{stage} starts from a trained model; name one with --init-from RUN_OR_CHECKPOINT")
    directory = options.output_dir or Path("runs") / recipe.name
    with open_run(recipe, directory, resume=options.resume):
        train_stages(recipe, directory, [stage], init_from=options.init_from)
        if is_first():
            _finish(directory)


def recipe_command(doc: str | None) -> None:
    """`launch/recipe.py`: the stages in order in one worker group, then export, evaluation, report."""
    parser = Parser(doc)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output-dir")
    parser.add_argument("--stages", metavar="A,B", help="only these stages of the recipe")
    options, overrides = parser.parse()
    recipe = load_recipe(options.recipe, overrides)
    names = _stage_names(recipe, options.stages)
    directory = options.output_dir or Path("runs") / recipe.name
    started = time.monotonic()
    with open_run(recipe, directory, resume=options.resume):
        train_stages(recipe, directory, names, init_from=_stage_before(recipe, directory, names[0]))
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


def export_and_evaluate(recipe: Recipe, directory: Path) -> None:
    """What follows training, in this process: export/hf, export/evaluation.json, samples.json, lineage.json.

    It is about all stages that the directory holds, also where this command ran only some of them.
    """
    from stages.checkpoint import latest, resolve
    from stages.loading import load_model

    config = recipe.evaluation
    names = [name for name in recipe.stages() if latest(directory / name / "checkpoints") is not None]
    final = resolve(directory)
    _export(final, directory)
    write_json(directory / "export" / "evaluation.json", _evaluate(config, load_model(final)))
    samples = [
        {"stage": name, "prompt": prompt, "text": continue_text(load_model(directory / name), prompt, config.max_new_tokens)}
        for name in names
        for prompt in config.prompts
    ]
    write_json(directory / "samples.json", samples)
    write_json(directory / "lineage.json", _lineage(directory, names))


def _export(final: Path, directory: Path) -> None:
    """export/hf of the final checkpoint. Where no layout holds the model it is left out, and said: the rest goes on.

    export/source.json says of which checkpoint the folder is, or why there is none; the report reads it.
    """
    from modeling.hf_convert import ConversionError
    from stages.export import export_hf

    target, marker = directory / "export" / "hf", directory / "export" / "source.json"
    source = {"checkpoint": str(final.relative_to(directory))}
    if target.exists() and _read_marker(marker) == source:
        return
    _remove_old(target)
    try:
        export_hf(final, target)
    except ConversionError as error:
        _say(f"warning: export/hf is left out: {error}")
        source["left_out"] = str(error)
    write_json(marker, source)


def _read_marker(path: Path) -> object:
    """A damaged marker says nothing: the export is made anew."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove_old(target: Path) -> None:
    """An export of an older checkpoint of this same run is made anew; nothing else is ever removed."""
    if target.exists():
        import shutil

        shutil.rmtree(target)


def _evaluate(config: EvaluationConfig, loaded: LoadedModel) -> dict[str, dict[str, float]]:
    from launch.tasks import resolve_tasks, score_task

    return {task.key: score_task(loaded, task, limit=config.limit) for task in resolve_tasks(config.tasks, required=False)}


def continue_text(loaded: LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation. A prompt that starts with `user:` is asked as a conversation."""
    from data_pipeline.chat import render_prompt
    from modeling.generate import generate

    tokenizer = loaded.tokenizer
    if prompt.startswith("user:"):
        ids = render_prompt(tokenizer, [{"role": "user", "content": prompt.removeprefix("user:").strip()}])
    else:
        ids = [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(prompt)]
    stop = [token for token in (tokenizer.eos_id, tokenizer.eot_id) if token is not None]
    return tokenizer.decode(list(generate(loaded.model, ids, max_new_tokens, stop_ids=stop)))


def _lineage(directory: Path, names: list[StageName]) -> dict[str, object]:
    from stages.checkpoint import latest, read_document

    chain = []
    for name in names:
        if (checkpoint := latest(directory / name / "checkpoints")) is not None:
            entry = read_document(checkpoint, "lineage")
            chain.append({"checkpoint": str(checkpoint.relative_to(directory)), **entry})
    return {"run": directory.name, "stages": chain}


def _finish(directory: Path) -> None:
    from launch.report import write_report

    _say(f"report: {write_report(directory)}")


def _say(text: str) -> None:
    """A line for the person at the terminal; commands print results to standard output and this to standard error."""
    sys.stderr.write(text + "\n")
