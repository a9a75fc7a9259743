"""What becomes of a front: models with inherited weights to be trained on, and, where asked for, that training and its outcome.

A pick is a folder: a checkpoint (none where candidates begin with random weights), `recipe.toml`, `expected.json` (what the
search says of it) and, once it was trained, packed and measured, `final.json` beside its run.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.rundir import read_json_object, write_json
from launch.sweep_config import SweepRecipe
from launch.sweep_supernet import extract_pick
from search.front import front, knee
from search.readings import Readings
from search.records import Trial
from search.store import Store
from stages.errors import InputError, RunError

if TYPE_CHECKING:
    from launch.config import Recipe
    from launch.sweep_data import Pick
    from modeling.config import ModelConfig

PICKS = "picks"
ROOT = Path(__file__).resolve().parent.parent
Backbone = tuple[Path, Path]
"""(checkpoint, JSON of its importance), or a supernet's folder and nothing, or nothing at all."""


def predictions(store: Store) -> dict[int, dict[str, float]]:
    """By trial: what the latency models said before it was measured."""
    return {number: {name: mean for name, (mean, _) in said.items()} for number, said in _predicted(store).items()}


def _predicted(store: Store) -> dict[int, dict[str, tuple[float, float]]]:
    """By trial and metric: (mean, deviation)."""
    said: dict[str, dict[str, tuple[float, float]]] = {}
    for event in store.events("predicted"):
        if event.detail["key"] not in said:  # the first is what it was chosen by
            older = {"ttft_ms": event.detail.get("deviation", 0.0)}  # when there was one number only
            deviations = event.detail.get("deviations", older)
            said[event.detail["key"]] = {name: (event.detail[name], deviations[name]) for name in deviations}
    return {trial.number: said[trial.key] for trial in store.trials() if trial.key in said}


def front_of(sweep: SweepRecipe, store: Store) -> list[Trial]:
    """Without those that the confirmation spoke against."""
    from launch.sweep_run import record_of, sweep_plan

    plan = sweep_plan(sweep)
    gone = {point.trial for point in record_of(sweep, store, store.path.parent).dropped}
    return [trial for trial in front(store.trials("ok"), plan.references, plan.bounds()) if trial.number not in gone]


def choose_picks(sweep: SweepRecipe, store: Store, count: int) -> list[Trial]:
    """Of the front, those first that give up least. Raises InputError where it is smaller than that."""
    found = front_of(sweep, store)
    if not found:
        raise InputError("the search has no model within its limits yet; let it go on, or raise goal.*")
    if count > len(found):
        raise InputError(f"{count} picks: the front has {len(found)} models")
    return knee(found, list(sweep.goal.objectives))[:count]


def export_picks(sweep: SweepRecipe, directory: Path, count: int, output: Path, say: Callable[[str], None]) -> list[Path]:
    """`count` models of the front, most gained for least given up first: inherited checkpoint, recipe, expectation.

    Each folder is started as it is, with `start_of`.
    """
    from launch.sweep_run import DATABASE, prepare_backbone

    with closing(Store.read(directory / DATABASE)) as store:
        chosen, said = choose_picks(sweep, store, count), _predicted(store)
    backbone = prepare_backbone(sweep, directory, say)
    return [write_pick(sweep, trial, said.get(trial.number, {}), output, backbone) for trial in chosen]


def write_pick(
    sweep: SweepRecipe, trial: Trial, said: Mapping[str, tuple[float, float]], output: Path, backbone: Backbone
) -> Path:
    """The folder of one; one that is whole is left as it is."""
    from launch.config import save_toml

    folder, space = output / f"trial-{trial.number:04d}", sweep.make_space()
    if (folder / "expected.json").is_file():
        return folder
    config = space.to_config(space.unflatten(trial.config["candidate"]))
    model = config if sweep.quality.source == "scratch" else _inherit(sweep, config, backbone, folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_toml(replace(_longer(sweep), name=f"{sweep.name}-{trial.number:04d}", model=model), folder / "recipe.toml")
    device, results = sweep.device, dict(trial.results or {})
    bands = {name: _band(mean, math.hypot(off, trial.noise.get(name, 0.0))) for name, (mean, off) in said.items()}
    write_json(folder / "expected.json", {
        "trial": trial.number, "predicted": bands, "search": results, "device": list(device.names),
        "prompt_tokens": device.prompt_tokens, "threads": device.threads, "kv": device.kv,
        "processor_time": device.processor_time,
    })  # fmt: skip
    return folder


def _inherit(sweep: SweepRecipe, config: ModelConfig, backbone: Backbone, folder: Path) -> ModelConfig:
    """Write the candidate's inherited checkpoint, where it is not there yet; its model."""
    from stages.checkpoint import latest
    from stages.prune import PruneOptions, prune_checkpoint
    from stages.state import read_model

    checkpoint = latest(folder / "checkpoints")
    if checkpoint is None and sweep.quality.source == "supernet":
        checkpoint = extract_pick(sweep, backbone[0].parent, config, folder)
    elif checkpoint is None:
        options = PruneOptions(variant=sweep.quality.variant, layers=sweep.quality.layers)
        checkpoint = prune_checkpoint(*backbone, config, folder, options)
    return read_model(checkpoint)[0]


def start_of(folder: Path) -> list[str]:
    """Of `launch/recipe.py`: what trains a pick, from its checkpoint where it has one."""
    inherited = ["--init-from", str(folder)] if (folder / "checkpoints").is_dir() else []
    return ["--recipe", str(folder / "recipe.toml"), *inherited]


def _band(mean: float, deviation: float) -> dict[str, float]:
    """95 %, of what a measurement will give: the model's uncertainty and a measurement's."""
    return {"value": mean, "low": max(0.0, mean - 1.96 * deviation), "high": mean + 1.96 * deviation}


def _longer(sweep: SweepRecipe) -> Recipe:
    """The recipe of a pick: the sweep's, with the numbers of steps that picks get."""
    stages = sweep.recipe.stages()
    longer: dict[str, Any] = {name: replace(stages[name], steps=steps) for name, steps in sweep.retrain_steps.items()}
    return replace(sweep.recipe, **longer)


# --- training what was picked -----------------------------------------------------------------------------------------


def retrain_front(
    sweep: SweepRecipe, directory: Path, readings: Readings, backbone: Backbone, say: Callable[[str], None]
) -> None:
    """Train `sweep.retrain` picks through the recipe's stages, pack and measure them as candidates were; what was done is
    found again. Raises RunError where a training fails."""
    store = readings.queue.store
    count = min(sweep.retrain, len(front_of(sweep, store)))
    said = _predicted(store)
    for trial in choose_picks(sweep, store, count):
        folder = write_pick(sweep, trial, said.get(trial.number, {}), directory / PICKS, backbone)
        if (folder / "final.json").is_file():
            continue
        say(f"training trial {trial.number} through {', '.join(sweep.recipe.stages())}")
        run = folder / "run"
        _train(folder, run, readings.tick)
        with readings.farm:
            final = {"trial": trial.number, "run": str(run.relative_to(directory)), **_losses(sweep, run),
                     **_measured(readings, trial, run / "export" / "model.pocket")}  # fmt: skip
        write_json(folder / "final.json", final)


def _train(folder: Path, run: Path, tick: Callable[[], None]) -> None:
    """The command that a user would type, in a process of its own; what it says is in `run.log`."""
    command = [sys.executable, str(ROOT / "launch" / "recipe.py"), *start_of(folder), "--output-dir", str(run), "--resume"]
    log = folder / "run.log"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                tick()
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunError(f"training {folder} ended with status {process.returncode} ({said[-1] if said else 'it said nothing'}); "
                       f"see {log}")  # fmt: skip


def _losses(sweep: SweepRecipe, run: Path) -> dict[str, Any]:
    """`loss`: of the text that candidates were scored on, after the stage that they were scored by. `losses`: all there are."""
    from launch.search_quality import held_out_set

    tables = {name: json.loads((run / name / "evaluation.json").read_text(encoding="utf-8"))["after"]
              for name in sweep.recipe.stages() if (run / name / "evaluation.json").is_file()}  # fmt: skip
    name = held_out_set(sweep.recipe, "pretrain", sweep.quality.held_out).name
    losses = {stage: {part: values.get("loss") for part, values in table.items()} for stage, table in tables.items()}
    return {"loss": losses.get("pretrain", {}).get(name), "losses": losses}


def _measured(readings: Readings, trial: Trial, model: Path) -> dict[str, Any]:
    """By metric, as candidates were measured; `reason` where a measurement failed."""
    if not model.is_file():
        return {"reason": f"{model.name} was not packed; its run's export/source.json says why"}
    jobs = {}
    for point in readings.plan.points:
        jobs[point] = readings.submit_request(f"final/{trial.number}@{point}", readings.plan.request(model, point))
    ended = dict(zip(jobs, readings.wait(list(jobs.values())), strict=True))
    found = {metric.name: readings.value(ended[metric.point], metric) for metric in readings.metrics()}
    reason = "; ".join(job.reason for job in ended.values() if job.reason)
    return {**{name: value[0] for name, value in found.items() if value is not None}, **({"reason": reason} if reason else {})}


# --- for the page -----------------------------------------------------------------------------------------------------


def read_picks(directory: Path) -> list[Pick]:
    """Those in the sweep's own folder, in order of their trials; a damaged file counts as not there."""
    from launch.sweep_data import Estimate, Pick

    picks = []
    for file in sorted((directory / PICKS).glob("trial-*/expected.json")):
        expected, final = read_json_object(file), read_json_object(file.with_name("final.json"))
        numbers = {name: Estimate(**band) for name, band in expected.get("predicted", {}).items()}
        if (loss := expected.get("search", {}).get("loss")) is not None:
            numbers["loss"] = Estimate(value=loss)
        if "trial" in expected:
            measured = {name: final[name] for name in numbers if isinstance(final.get(name), int | float)}
            picks.append(Pick(trial=expected["trial"], path=str(file.parent.relative_to(directory)), expected=numbers,
                              measured=measured, why=final.get("reason", "")))  # fmt: skip
    return picks
