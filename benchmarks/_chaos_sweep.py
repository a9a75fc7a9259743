"""The whole search for benchmarks/search_chaos.py: latency stage, staged optimizer, two budgets, confirmation."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from modeling.identity import config_key
from search.farm import Farm
from search.front import front
from search.members import Member, Policy
from search.optim.base import Domain, Goal
from search.optim.staged import Settings, Staged
from search.quality import SyntheticScorer, as_score
from search.readings import LatencyPlan, Readings
from search.simulated import write_shape
from search.space import Space
from search.store import Store
from search.sweep import Sweep, SweepPlan, build_once
from search.workers import ProcessScorer

SPACE = Space.from_dict({
    "num_layers": [4, 6, 8, 10, 12], "hidden_size": [128, 192, 256, 320], "ffn_size": [256, 512, 768, 1024],
    "num_heads": [4, 8], "num_kv_heads": [2, 4],
    "fixed": {"vocab_size": 2048, "max_positions": 512, "window": 64},
})  # fmt: skip
LATENCY = LatencyPlan(prompt_tokens=128, decode_tokens=4, readings=24, more=6, max_readings=36, timeout_s=10.0)
FULL, SHORT = 1_000_000, 200_000
REFERENCES = {"loss": 4.0, "ttft_ms": 60.0}


def plan_of(trials: int) -> SweepPlan:
    return SweepPlan(trials=trials, references=REFERENCES, ordered=True, confirm=6, seed=3, short_tokens=SHORT,
                     least_pairs=min(20, trials // 3))  # fmt: skip


def score(candidate: Mapping[str, Any]) -> Mapping[str, float]:
    """A made-up scaling law with seeded noise; one candidate in fifty diverges."""
    time.sleep(0.05)
    scorer = SyntheticScorer(noise=0.01, infeasible_share=0.02)
    return as_score(scorer, lambda flat: SPACE.to_config(SPACE.unflatten(flat)), FULL, 0)(candidate)


def make_staged(space: Space, plan: SweepPlan, predict: Callable[..., Any]) -> Staged:
    domain = Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible)
    settings = Settings(initial=8, pool=300, generations=4, draws=32)
    known = {"ttft_ms": partial(predict, "ttft_ms")}
    return Staged(domain, Goal(objectives=plan.references), plan.seed, known=known, settings=settings)


def sweep_process(folder: Path, members: Sequence[Member], policy: Policy, trials: int) -> None:
    build = build_once(folder / "shapes", write_shape, config_key)
    largest = SPACE.to_config(SPACE.unflatten(dict.fromkeys(SPACE.flat_choices(), "full")
                                              | {name: values[-1] for name, values in SPACE.choices.items()}))  # fmt: skip
    with ExitStack() as stack:
        store = stack.enter_context(Store.open(folder / "search.sqlite", {"trials": trials}))
        farm = Farm(store, members, policy=policy, sentinel=LATENCY.request(build(largest)))
        farm.queue.recover()
        scorers = [stack.enter_context(closing(ProcessScorer("benchmarks._chaos_sweep:score"))) for _ in range(2)]
        readings = Readings(farm, SPACE, LATENCY, build)
        Sweep(store, SPACE, plan_of(trials), readings, scorers, make_staged).run()


def outcome(store: Store) -> dict[str, Any]:
    """What must be equal beside the trials."""
    confirmed = {event.trial: event.detail for event in store.events("confirmed")}
    return {"front": [trial.number for trial in front(store.trials("ok"), REFERENCES)],
            "confirmed": [[number, confirmed[number]] for number in sorted(confirmed, key=str)],
            "short": [trial.number for trial in store.trials("ok") if "predicted_loss" in (trial.results or {})],
            "phase": store.phase}  # fmt: skip
