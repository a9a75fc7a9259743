"""The loop of a search over a simulated device and a synthetic loss."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from modeling.identity import config_key
from search.farm import Farm
from search.front import front, values_of
from search.jobs import violations
from search.members import Member, Policy
from search.optim.base import Domain, Goal
from search.optim.staged import Settings, Staged
from search.quality import SyntheticScorer
from search.readings import LatencyPlan, Readings
from search.simulated import Faults, Physics, SimulatedDevice, write_shape
from search.space import Space
from search.store import Store
from search.sweep import Sweep, SweepPlan, build_once

SPACE = Space.from_dict({
    "num_layers": [4, 6, 8], "hidden_size": [128, 192, 256], "ffn_size": [256, 512, 768], "num_heads": [4],
    "num_kv_heads": [2, 4],
    "fixed": {"vocab_size": 2048, "max_positions": 512, "window": 64},
})  # fmt: skip
PLAN = SweepPlan(trials=14, budget_tokens=1_000_000, references={"loss": 4.0, "ttft_ms": 60.0}, batch=4, confirm=3, seed=3)
LATENCY = LatencyPlan(prompt_tokens=128, decode_tokens=4, readings=20, more=4, max_readings=24, timeout_s=0.2)
QUICK = Policy(warmup=3, min_repeats=3, max_repeats=6, retry_s=0.0, reconnect_s=0.0, cool_s=0.0, backoff_s=(0.0, 0.0, 0.0))


def make_staged(space, plan, predict):
    domain = Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible)
    settings = Settings(initial=6, pool=150, generations=2, draws=16)
    return Staged(domain, Goal(objectives=plan.references), plan.seed, known={"ttft_ms": predict}, settings=settings)


def sweep_in(folder, *, faults=None, scorer=None, plan=PLAN, tick=lambda: None, seed=1):
    """(sweep, store, executor); the store is open."""
    store = Store.open(folder / "sweep.db", {"space": SPACE.to_dict(), "seed": plan.seed})
    device = SimulatedDevice(seed=seed, physics=Physics(noise=0.01), faults=faults or Faults(), real_s=0.0)
    farm = Farm(store, [Member(device)], policy=QUICK)
    farm.queue.recover()
    build = build_once(folder / "shapes", write_shape, config_key)
    executor = ThreadPoolExecutor(2)
    readings = Readings(farm, SPACE, LATENCY, build, tick=tick)
    return Sweep(store, SPACE, plan, readings, scorer or SyntheticScorer(noise=0.002), executor, make_staged, tick), store, farm


def run(folder, **changes):
    sweep, store, farm = sweep_in(folder, **changes)
    with farm:
        found = sweep.run()
    return found, store, farm


def test_a_sweep_finds_a_front_of_measured_models(tmp_path):
    found, store, farm = run(tmp_path)
    trials = store.trials()
    assert store.phase == "done" and len(trials) == PLAN.trials and {trial.state for trial in trials} == {"ok"}
    assert not violations(farm.queue)
    assert [trial.number for trial in found] == [trial.number for trial in front(trials, PLAN.references)]
    assert all("ttft_ms" in trial.results for trial in found[: PLAN.confirm])
    losses, times = zip(*((values_of(t)["loss"], values_of(t)["ttft_ms"]) for t in found), strict=True)
    assert list(losses) == sorted(losses) and list(times) == sorted(times, reverse=True)
    assert len(store.events("confirmed")) == min(PLAN.confirm, len(found))
    assert sorted(trial.told for trial in trials) == list(range(PLAN.trials))


def test_failures_end_trials_and_never_become_numbers(tmp_path):
    scorer = SyntheticScorer(infeasible_share=0.3)
    _, store, farm = run(tmp_path, scorer=scorer, faults=Faults(timeout=0.05, nonsense=0.03))
    ended = store.trials("infeasible", "failed")
    assert ended and all(trial.results is None and trial.reason for trial in ended)
    assert all(trial.told is not None for trial in store.trials()) and not violations(farm.queue)


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("at", [40])
def test_killed_and_started_again_it_ends_every_trial_once(tmp_path, at):
    calls = 0

    def tick():
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed

    sweep, store, farm = sweep_in(tmp_path, tick=tick)
    with farm:
        try:
            sweep.run()
        except Killed:
            pass
    sweep.executor.shutdown(cancel_futures=True)
    store.close()
    found, store, farm = run(tmp_path)
    trials = store.trials()
    assert len(trials) == PLAN.trials and all(trial.told is not None for trial in trials)
    assert found and not violations(farm.queue)
    state = json.loads(store.snapshot())
    assert [t["status"] for t in state["trials"]].count("pending") == 0 and len(state["trials"]) == PLAN.trials


def test_a_limit_below_the_fastest_candidate_is_refused_in_words(tmp_path):
    plan = SweepPlan(trials=4, budget_tokens=1000, references={"loss": 8.0, "ttft_ms": 1e-6})
    with pytest.raises(ValueError, match="fastest of .* measured candidates takes .* ms, the limit is 1e-06; raise the limit"):
        run(tmp_path, plan=plan)
