"""A search from the first reading to the confirmed front: latency, then trials (search/service.py), then the front once more.

The latency model is what the optimizer takes for known while it proposes; every trial is then measured and scored, and the
model is fitted again before each question. Killed anywhere and started again, a search goes on from its database:
readings and trials' measurements are jobs that end once, and so is what confirms the front.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling.config import ModelConfig
from search.budgets import TwoBudgets, answer_of
from search.front import front, spread
from search.readings import Readings, learn_latency
from search.records import Job, Results, Trial
from search.replay import Forecast, note_asked
from search.service import Measure, Service, SweepError
from search.space import Candidate, Space
from search.store import Store
from search.workers import Score

if TYPE_CHECKING:
    from search.optim.base import Optimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How much is tried, and what counts."""

    trials: int
    references: Mapping[str, float]
    """`loss` and `ttft_ms`: values that are just no longer of use."""
    limits: Mapping[str, float] = field(default_factory=dict)
    batch: int = 8
    """Trials that may be open at once."""
    ordered: bool = False
    """Ask when all of a batch have ended, which makes a search repeatable; else whenever one has."""
    confirm: int = 8
    """Models of the front that are measured and scored a second time."""
    seed: int = 0
    short_tokens: int = 0
    """Above 0: trials are scored at this budget first (search/budgets.py)."""
    least_pairs: int = 20
    """Trials scored at both budgets before a short score may stand alone."""


MakeOptimizer = Callable[[Space, SweepPlan, Callable[..., Any]], "Optimizer"]


class Sweep:
    """One search. `run` goes through the phases that are still to do."""

    def __init__(
        self, store: Store, space: Space, plan: SweepPlan, readings: Readings, scorers: Sequence[Score],
        make_optimizer: MakeOptimizer, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`scorers` work side by side; each takes a candidate in flat form, with `seed` where it is scored again."""
        self.store, self.space, self.plan, self.readings = store, space, plan, readings
        self.scorers, self.make_optimizer, self.tick = scorers, make_optimizer, tick
        self.forecast = Forecast(readings)

    def run(self) -> list[Trial]:
        """The confirmed front, best quality first."""
        self._enter("latency", after="space")
        if self.store.phase == "latency":
            with self.readings.farm:
                learn_latency(self.readings, self.plan.seed, self.plan.references["ttft_ms"])
        # Judged once: with the trials' readings the gates might ask for more, and the search would be another.
        self.forecast.refit()
        self._check_reachable()
        self._enter("pareto", after="latency")
        asker, plan = _Asker(self), self.plan
        budgets = TwoBudgets(self.store, plan.short_tokens, plan.references, plan.limits, least=plan.least_pairs)
        service = Service(self.store, self.readings.farm, asker, _TrialPlan(self), trials=self.plan.trials,
                          scorers=self.scorers, batch=self.plan.batch, ordered=self.plan.ordered,
                          on_asked=asker.note, budgets=budgets if plan.short_tokens else None)  # fmt: skip
        service.run(on_step=self.tick)
        self._enter("confirm", after="pareto")
        with self.readings.farm:
            self._confirm()
        self._enter("done", after="confirm")
        return self.front()

    def front(self) -> list[Trial]:
        return front(self.store.trials("ok"), self.plan.references, self.plan.limits)

    def candidate(self, trial: Trial) -> Candidate:
        return self.space.unflatten(trial.config["candidate"])

    def _enter(self, phase: str, after: str) -> None:
        if self.store.phase == after:
            self.store.phase = phase

    def _check_reachable(self) -> None:
        """Raises SweepError where even the fastest architecture that was met is over the limit."""
        model = self.forecast.model
        assert model is not None
        fastest = min(model.readings, key=lambda reading: reading.value)
        limit = min(self.plan.references["ttft_ms"], self.plan.limits.get("ttft_ms", np.inf))
        low, _ = model.interval([fastest.config])
        if min(fastest.value, float(low[0])) > limit:
            raise SweepError(f"the fastest of {len(model.readings)} measured candidates takes {fastest.value:.4g} ms, "
                             f"the limit is {limit:.4g}; raise the limit, shorten the prompt or allow smaller models")

    def _confirm(self) -> None:
        """Measure the front's models again and score them with another seed; what that gives is an event `confirmed`."""
        known = {event.trial for event in self.store.events("confirmed")}
        chosen = [trial for trial in spread(self.front(), list(self.plan.references), self.plan.confirm)
                  if trial.number not in known]  # fmt: skip
        with ThreadPoolExecutor(len(self.scorers) or 1) as pool:
            again = {"seed": self.plan.seed + 1}
            scores = [pool.submit(self.scorers[i % len(self.scorers)], {**trial.config["candidate"], **again})
                      for i, trial in enumerate(chosen) if self.scorers]  # fmt: skip
            for i, trial in enumerate(chosen):
                job = self.readings.submit(f"confirm/{trial.number}/{trial.key}", self.candidate(trial))
                ended = self.readings.wait([job])[0]
                loss, reason = None, ended.reason
                try:
                    loss = scores[i].result()["loss"] if scores else None
                except (ValueError, RuntimeError) as error:  # what a scorer says of a candidate, or of itself
                    reason = str(error)
                results = dict(trial.results or {})
                self.store.event("confirmed", trial=trial.number, losses=[results.get("loss"), loss], reason=reason,
                                 ttft_ms=[results.get("ttft_ms"), (ended.results or {}).get("ttft_ms")])  # fmt: skip
                self.tick()


class _Asker:
    """The optimizer as the service knows one: before it is asked, the latency model learns of the newest readings."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.optimizer = sweep.make_optimizer(sweep.space, sweep.plan, sweep.forecast.predict)

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        self.sweep.forecast.refit()
        return self.optimizer.ask(n)

    def note(self, made: Sequence[Trial], wanted: int) -> None:
        """What the question rested on, and what is predicted of its trials."""
        sweep = self.sweep
        note_asked(sweep.store, sweep.forecast, sweep.plan.trials, made, wanted)
        means, deviations = sweep.forecast.predict([trial.config["candidate"] for trial in made])
        for trial, mean, deviation in zip(made, means, deviations, strict=True):
            sweep.store.event("predicted", key=trial.key, trial=trial.number, ttft_ms=float(mean), deviation=float(deviation))

    def tell(self, token: Any, results: Results | None, noise: Results) -> None:
        self.optimizer.tell(token, *answer_of(results, noise))

    def state(self) -> str:
        return json.dumps(self.optimizer.state())

    def load(self, state: str) -> None:
        self.optimizer.load(json.loads(state))


class _TrialPlan:
    """What a trial is: one measurement, and what the scorer says."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep

    def key(self, config: Mapping[str, Any]) -> str:
        return self.sweep.space.key(self.sweep.space.unflatten(config))

    def measures(self, config: Mapping[str, Any]) -> Sequence[Measure]:
        readings = self.sweep.readings
        request = readings.request(self.sweep.space.unflatten(config))
        return [Measure(name="ttft", request=request, device_class=readings.device_class)]

    def results(self, measured: Mapping[str, Job], scores: Results) -> tuple[Results, Results]:
        job = measured["ttft"]
        errors = next(item.errors for item in self.sweep.readings.queue.readings(job.id) if item.role == "result")
        return {**scores, "ttft_ms": (job.results or {})["ttft_ms"]}, {"ttft_ms": errors.get("ttft_ms", 0.0)}


def build_once(
    folder: Path, write: Callable[[ModelConfig, Path], Any], key: Callable[[ModelConfig], str]
) -> Callable[[ModelConfig], Path]:
    """A `build` that keeps each architecture's file under its key, whole or not at all."""

    def build(config: ModelConfig) -> Path:
        target = folder / f"{key(config)}.pocket"
        if not target.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            beside = folder / f".{key(config)}.part"
            write(config, beside)
            beside.replace(target)
        return target

    return build
