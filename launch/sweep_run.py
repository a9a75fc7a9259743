"""From a sweep's recipe to the running loop: the backbone, its importance, devices, scoring processes, the optimizer."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.ray_head import shared_cluster
from launch.rundir import write_json
from launch.sweep_budgets import ranking_of, short_notes
from launch.sweep_config import DeviceConfig, SweepRecipe
from launch.sweep_optimizer import optimizer_maker
from launch.sweep_picks import predictions, read_picks, retrain_front
from launch.sweep_score import CandidateScorer, turns_of
from launch.sweep_supernet import prepare_supernet
from launch.sweep_wandb import SweepWatch
from modeling.config import ModelConfig
from search.agent.measuring import Gate
from search.budgets import TwoBudgets
from search.devices import MeasureRequest, open_device
from search.devices.base import Device
from search.devices.driver import LocalDriver
from search.farm import Farm
from search.members import Member, Policy
from search.metrics import metrics_at
from search.readings import LatencyPlan, Readings
from search.records import Trial
from search.reference_output import CHECKED, ReferenceOutput
from search.space import Space
from search.store import Store
from search.sweep import Sweep, SweepPlan, build_once
from search.turns import MachineInTurn, Turns
from stages.errors import InputError

if TYPE_CHECKING:
    from launch.sweep_data import SweepRecord

logger = logging.getLogger(__name__)
DATABASE, SPEC = "sweep.db", "sweep.toml"
SENTINELS = 16


def run_sweep(sweep: SweepRecipe, directory: Path, say: Callable[[str], None], tick: Callable[[Store], None]) -> list[Trial]:
    """All phases that are still to do; the confirmed front."""
    import torch

    space = sweep.make_space()
    room = shared_cluster(sweep.recipe.launch, sweep.quality.processes)
    watch = SweepWatch(sweep, directory, directory / DATABASE)
    with closing(Store.open(directory / DATABASE, sweep.comparable())) as store, room, watch:
        backbone, importance = prepare_backbone(sweep, directory, say)
        torch.set_num_threads(1)  # what this process computes from now on is small, and the scoring processes need the cores
        turns = turns_of(sweep, directory)
        members = [Member(_open(name, turns)) for name in sweep.device.names]
        build = build_once(directory / "shapes", _write_random, _shape_key)
        farm = Farm(store, members, policy=policy_of(sweep.device), sentinel=_sentinel(sweep, build))
        farm.queue.recover()
        expect = ReferenceOutput(open_device("local")) if any(member.fidelity in CHECKED for member in members) else _unknown
        readings = Readings(farm, space, latency_plan(sweep), build, tick=lambda: tick(store), expect=expect)
        with ExitStack() as stack:
            scores = directory / "scores"
            scorers = [stack.enter_context(closing(CandidateScorer(directory / SPEC, backbone, importance, scores)))
                       for _ in range(sweep.quality.processes)]  # fmt: skip
            make = optimizer_maker(sweep.optimizer)
            found = Sweep(store, space, sweep_plan(sweep), readings, scorers, make, lambda: tick(store),
                          nullcontext if turns is None else turns.computing).run()  # fmt: skip
        if found and sweep.retrain:
            retrain_front(sweep, directory, readings, (backbone, importance), say)
        write_front(directory / "front.json", space, store, found, record_of(sweep, store, directory))
        return found


def prepare_backbone(sweep: SweepRecipe, directory: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    """(checkpoint, JSON of its importance). Trains the recipe's pre-training stage where no backbone is named.

    Of a search with a supernet: its folder, and nothing. Of one from random weights: nothing.
    """
    from launch.prune import calibrate
    from launch.runner import train_stages
    from modeling.prune import uncovered
    from stages.checkpoint import resolve
    from stages.prune import inherit_positions
    from stages.state import read_model

    if sweep.quality.source == "supernet":
        return prepare_supernet(sweep, directory, say), Path()
    if sweep.quality.source == "scratch":
        return Path(), Path()
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


def sweep_plan(sweep: SweepRecipe) -> SweepPlan:
    bounds = {"loss": sweep.goal.loss, **sweep.goal.device_limits()}
    return SweepPlan(trials=sweep.trials, batch=sweep.batch, confirm=sweep.confirm, seed=sweep.seed,
                     short_tokens=sweep.quality.short_tokens, references={name: bounds[name] for name in sweep.goal.objectives},
                     limits={name: bound for name, bound in bounds.items() if name not in sweep.goal.objectives})  # fmt: skip


def latency_plan(sweep: SweepRecipe) -> LatencyPlan:
    device = sweep.device
    return LatencyPlan(
        prompt_tokens=device.prompt_tokens, decode_tokens=device.decode_tokens, threads=device.threads, kv=device.kv,
        also=sweep.points()[1:],
        timeout_s=device.timeout_s, readings=device.readings, more=device.more, max_readings=device.max_readings,
    )  # fmt: skip


def policy_of(device: DeviceConfig) -> Policy:
    return Policy(warmup=device.warmup, min_repeats=device.min_repeats, max_repeats=device.max_repeats, drift=device.drift,
                  processor_time=device.processor_time, sentinel_jobs=device.sentinel_jobs or Policy.sentinel_jobs,
                  cool_s=device.cool_s, rest_s=device.rest_s, reboot=device.reboot,
                  gate=Gate(max_c=device.max_c or None, max_wait_s=device.max_wait_s))  # fmt: skip


def _open(name: str, turns: Turns | None) -> Device:
    return MachineInTurn(LocalDriver(), turns) if turns is not None and name == "local" else open_device(name)


def _unknown(request: MeasureRequest) -> None:
    """Of devices that are this machine, or only a model of one, there is nothing to check the output against."""


def _sentinel(sweep: SweepRecipe, build: Callable[[ModelConfig], Path]) -> MeasureRequest | None:
    """The same model every time the sweep is started: the one with most work of some, so that its time is steady."""
    if not sweep.device.sentinel_jobs:
        return None
    space = sweep.make_space()
    some = [space.to_config(candidate) for candidate in space.sample(random.Random(sweep.seed), SENTINELS)]
    chosen = max(some, key=lambda config: config.flops_per_token(sweep.device.prompt_tokens))
    return latency_plan(sweep).request(build(chosen))


def _write_random(config: ModelConfig, path: Path) -> None:
    from stages.random_packed import write_pocket

    write_pocket(config, path)


def _shape_key(config: ModelConfig) -> str:
    from modeling.identity import config_key

    return config_key(config)


# --- what comes out -------------------------------------------------------------------------------------------------


def write_front(path: Path, space: Space, store: Store, found: list[Trial], record: SweepRecord) -> None:
    """The front as JSON: candidate, loss, latency measured and predicted, what the confirmation said. Models that it speaks
    against come last, with the reason in `dropped`."""
    gone = {point.trial: point.reason for point in record.dropped}
    ends = {point.trial: point.intervals for point in (*record.front, *record.dropped)}
    confirmed = {event.trial: event.detail for event in store.events("confirmed")}
    predicted = predictions(store)
    points = []
    for trial in sorted(found, key=lambda trial: trial.number in gone):
        flat = trial.config["candidate"]
        config = space.to_config(space.unflatten(flat))
        points.append({
            "trial": trial.number, "key": trial.key, "candidate": flat, "parameters": config.num_params(),
            "active_parameters": config.num_active_params(),
            **{f"predicted_{name}": value for name, value in predicted.get(trial.number, {}).items()},
            **dict(trial.results or {}),
            "noise": dict(trial.noise), "confirmed": confirmed.get(trial.number),
            "intervals": ends.get(trial.number, {}), "dropped": gone.get(trial.number),
        })  # fmt: skip
    write_json(path, points)


def record_of(sweep: SweepRecipe, store: Store, directory: Path) -> SweepRecord:
    """What the page and the live table show."""
    from launch.sweep_collect import from_store
    from launch.sweep_data import Limit, Objective

    space, goal = sweep.make_space(), sweep.goal
    words = {metric.name: {"name": metric.name, "label": metric.label(sweep.device.processor_time), "unit": metric.unit}
             for metric in metrics_at(sweep.points(), sweep.main)}  # fmt: skip
    bounds = goal.device_limits()
    loss = Objective(name="loss", label="held-out loss", unit="nats a token", reference=goal.loss)
    others = [Objective(**words[name], reference=bounds[name]) for name in goal.objectives[1:]]  # type: ignore[arg-type]
    agreement = TwoBudgets(store, sweep.quality.short_tokens, {"loss": goal.loss}).agreement()
    return from_store(
        store, name=sweep.name, objectives=(loss, *others),
        limits=[Limit(**words[name], value=bound) for name, bound in bounds.items()],  # type: ignore[arg-type]
        space_size=space.size(), to_model=lambda config: space.to_config(space.unflatten(config["candidate"])),
        predicted=predictions(store), picks=read_picks(directory), ranking=ranking_of(agreement, loss),
        notes=short_notes(sweep.quality.short_tokens, store.trials("ok"), agreement),
    )  # fmt: skip


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
    optimizer_maker(sweep.optimizer)(space, plan, lambda metric, flats: (0.0, 0.0)).load(stored)
    return problems
