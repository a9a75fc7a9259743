"""From a sweep's recipe to the running loop: the backbone, its importance, devices, scoring processes, the optimizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ray_head import shared_cluster
from launch.rundir import write_json
from launch.sweep_budgets import ranking_of, short_notes
from launch.sweep_config import DeviceConfig, SweepRecipe
from launch.sweep_score import CandidateScorer
from modeling.config import ModelConfig
from search.budgets import TwoBudgets
from search.devices import open_device
from search.farm import Farm
from search.front import front, knee
from search.members import Member, Policy
from search.readings import LatencyPlan, Readings
from search.records import Trial
from search.space import Space
from search.store import Store
from search.sweep import Sweep, SweepPlan, build_once
from stages.errors import InputError

if TYPE_CHECKING:
    from launch.sweep_data import SweepRecord

logger = logging.getLogger(__name__)
DATABASE, SPEC = "sweep.db", "sweep.toml"


def run_sweep(sweep: SweepRecipe, directory: Path, say: Callable[[str], None], tick: Callable[[Store], None]) -> list[Trial]:
    """All phases that are still to do; the confirmed front."""
    space = sweep.make_space()
    room = shared_cluster(sweep.recipe.launch, sweep.quality.processes)
    with closing(Store.open(directory / DATABASE, sweep.comparable())) as store, room:
        backbone, importance = prepare_backbone(sweep, directory, say)
        members = [Member(open_device(name)) for name in sweep.device.names]
        build = build_once(directory / "shapes", _write_random, _shape_key)
        farm = Farm(store, members, policy=_policy(sweep.device))
        farm.queue.recover()
        readings = Readings(farm, space, latency_plan(sweep.device), build, tick=lambda: tick(store))
        with ExitStack() as stack:
            scores = directory / "scores"
            scorers = [stack.enter_context(closing(CandidateScorer(directory / SPEC, backbone, importance, scores)))
                       for _ in range(sweep.quality.processes)]  # fmt: skip
            make = optimizer_maker(sweep.optimizer)
            found = Sweep(store, space, sweep_plan(sweep), readings, scorers, make, lambda: tick(store)).run()
        write_front(directory / "front.json", space, store, found)
        return found


def prepare_backbone(sweep: SweepRecipe, directory: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    """(checkpoint, JSON of its importance). Trains the recipe's pre-training stage where no backbone is named."""
    from launch.prune import calibrate
    from launch.runner import train_stages
    from modeling.prune import uncovered
    from stages.checkpoint import resolve
    from stages.prune import inherit_positions
    from stages.state import read_model

    named = sweep.quality.backbone
    if not named:
        if sweep.recipe.pretrain is None:
            raise InputError("quality.backbone is empty and the recipe has no pretrain stage; name a run, or add the stage")
        say("training the backbone")
        train_stages(sweep.recipe, directory / "backbone", ["pretrain"], init_from=None)
        named = str(directory / "backbone" / "pretrain")
    checkpoint = resolve(Path(named))
    config, _ = read_model(checkpoint)
    largest = inherit_positions(replace(sweep.recipe.model, attention=(), block_repeat=1), config)
    if problems := uncovered(config, largest):
        raise InputError(f"quality.backbone {named} does not cover the space's largest model: {'; '.join(problems)}")
    say("scoring the backbone's parts")
    return checkpoint, calibrate(checkpoint, sweep.recipe, sweep.quality.calibration_sequences)


def optimizer_maker(kind: str) -> Callable[[Space, SweepPlan, Callable[..., Any]], Any]:
    """Makes the optimizer of that name for a sweep; what is predicted of latency is known to `staged` alone."""

    def make(space: Space, plan: SweepPlan, predict: Callable[..., Any]) -> Any:
        from search.optim.base import Domain, Goal
        from search.optim.catalog import make_optimizer

        options: dict[str, Any] = {}
        if kind == "staged":
            from search.optim.staged import Settings

            settings = Settings(initial=max(4, min(16, plan.trials // 4)))
            options = {"known": {"ttft_ms": predict}, "settings": settings}
        domain = Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible)
        return make_optimizer(kind, domain, Goal(objectives=plan.references, limits=plan.limits), plan.seed, **options)

    return make


def sweep_plan(sweep: SweepRecipe) -> SweepPlan:
    return SweepPlan(trials=sweep.trials, batch=sweep.batch, confirm=sweep.confirm, seed=sweep.seed,
                     short_tokens=sweep.quality.short_tokens,
                     references={"loss": sweep.goal.loss, "ttft_ms": sweep.goal.ttft_ms})  # fmt: skip


def latency_plan(device: DeviceConfig) -> LatencyPlan:
    return LatencyPlan(
        prompt_tokens=device.prompt_tokens, decode_tokens=device.decode_tokens, threads=device.threads, kv=device.kv,
        timeout_s=device.timeout_s, readings=device.readings, more=device.more, max_readings=device.max_readings,
    )  # fmt: skip


def _policy(device: DeviceConfig) -> Policy:
    return Policy(warmup=device.warmup, min_repeats=device.min_repeats, max_repeats=device.max_repeats)


def _write_random(config: ModelConfig, path: Path) -> None:
    from stages.random_packed import write_pocket

    write_pocket(config, path)


def _shape_key(config: ModelConfig) -> str:
    from modeling.identity import config_key

    return config_key(config)


# --- what comes out -------------------------------------------------------------------------------------------------


def write_front(path: Path, space: Space, store: Store, found: list[Trial]) -> None:
    """The front as JSON: candidate, loss, latency measured and predicted, what the confirmation said."""
    confirmed = {event.trial: event.detail for event in store.events("confirmed")}
    predicted = predictions(store)
    points = []
    for trial in found:
        flat = trial.config["candidate"]
        config = space.to_config(space.unflatten(flat))
        points.append({
            "trial": trial.number, "key": trial.key, "candidate": flat, "parameters": config.num_params(),
            "predicted_ttft_ms": predicted[trial.number]["ttft_ms"], **dict(trial.results or {}),
            "noise": dict(trial.noise), "confirmed": confirmed.get(trial.number),
        })  # fmt: skip
    write_json(path, points)


def predictions(store: Store) -> dict[int, dict[str, float]]:
    """By trial: what the latency model said before it was measured."""
    by_key = {event.detail["key"]: {"ttft_ms": event.detail["ttft_ms"]} for event in reversed(store.events("predicted"))}
    return {trial.number: by_key[trial.key] for trial in store.trials() if trial.key in by_key}


def record_of(sweep: SweepRecipe, store: Store) -> SweepRecord:
    """What the page and the live table show."""
    from launch.sweep_collect import from_store
    from launch.sweep_data import Limit, Objective

    space, goal = sweep.make_space(), sweep.goal
    first = {"name": "ttft_ms", "label": "time to first token", "unit": "ms"}
    loss = Objective(name="loss", label="held-out loss", unit="nats a token", reference=goal.loss)
    agreement = TwoBudgets(store, sweep.quality.short_tokens, {"loss": goal.loss}).agreement()
    return from_store(
        store, name=sweep.name, objectives=(loss, Objective(**first, reference=goal.ttft_ms)),  # type: ignore[arg-type]
        limits=(Limit(**first, value=goal.ttft_ms),), space_size=space.size(),  # type: ignore[arg-type]
        to_model=lambda config: space.to_config(space.unflatten(config["candidate"])), predicted=predictions(store),
        ranking=ranking_of(agreement, loss), notes=short_notes(sweep.quality.short_tokens, store.trials("ok"), agreement),
    )  # fmt: skip


def export_picks(sweep: SweepRecipe, directory: Path, count: int, output: Path, say: Callable[[str], None]) -> list[Path]:
    """`count` models of the front, most gained for least given up first: inherited checkpoint, recipe, expectation.

    Each folder is started as it is: `launch/recipe.py --recipe FOLDER/recipe.toml --init-from FOLDER`.
    """
    from launch.config import save_toml
    from stages.prune import PruneOptions, prune_checkpoint
    from stages.state import read_model

    space = sweep.make_space()
    with closing(Store.read(directory / DATABASE)) as store:
        plan = sweep_plan(sweep)
        found = front(store.trials("ok"), plan.references, plan.limits)
    if not found:
        raise InputError(f"{directory} has no model within its limits yet; let the sweep go on, or raise goal.*")
    if count > len(found):
        raise InputError(f"--pick {count}: the front has {len(found)} models")
    backbone, importance = prepare_backbone(sweep, directory, say)
    made = []
    for trial in knee(found, list(plan.references))[:count]:
        folder = output / f"trial-{trial.number:04d}"
        config = space.to_config(space.unflatten(trial.config["candidate"]))
        options = PruneOptions(variant=sweep.quality.variant, layers=sweep.quality.layers)
        checkpoint = prune_checkpoint(backbone, importance, config, folder, options)
        model, _ = read_model(checkpoint)
        save_toml(replace(sweep.recipe, name=f"{sweep.name}-{trial.number:04d}", model=model), folder / "recipe.toml")
        device = sweep.device
        write_json(folder / "expected.json", {
            **dict(trial.results or {}), "device": list(device.names),
            "prompt_tokens": device.prompt_tokens, "threads": device.threads, "kv": device.kv,
        })  # fmt: skip
        made.append(folder)
    return made


def disagreements(sweep: SweepRecipe, directory: Path) -> list[str]:
    """What the database and the optimizer's stored state say differently, in words; empty where they agree."""
    space, plan = sweep.make_space(), sweep_plan(sweep)
    with closing(Store.read(directory / DATABASE)) as store:
        snapshot, trials = store.snapshot(), store.trials()
    if snapshot is None:
        return ["no optimizer state is stored"]
    stored = json.loads(snapshot)
    problems = []
    if len(stored["trials"]) != len(trials):
        problems.append(f"the optimizer knows {len(stored['trials'])} trials, the database has {len(trials)}")
    for trial in trials:
        if trial.config["token"] >= len(stored["trials"]):
            continue
        known = stored["trials"][trial.config["token"]]
        asked = space.key(space.unflatten(known["config"]))
        if asked != trial.key:
            problems.append(f"trial {trial.number} is {trial.key}, the optimizer asked {asked}")
        if (known["values"] is None) != (trial.results is None) and trial.told is not None:
            problems.append(f"trial {trial.number} is {trial.state}, the optimizer was told {known['status']}")
    optimizer_maker(sweep.optimizer)(space, plan, lambda flats: None).load(stored)
    return problems
