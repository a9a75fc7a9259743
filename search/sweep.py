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
from search.alarms import raise_alarms
from search.budgets import TwoBudgets, answer_of
from search.front import front, spread
from search.metrics import Point
from search.readings import Readings, learn_latency, report_others
from search.records import Job, Results, Trial
from search.replay import Forecast, note_asked
from search.service import Measure, Service, SweepError
from search.space import Candidate, Space
from search.store import Store
from search.workers import Score

if TYPE_CHECKING:
    from search.optim.base import Optimizer

log = logging.getLogger(__name__)
MAIN = "ttft"
"""Name of the measurement of a trial at the search's own point; others are called by their point."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How much is tried, and what counts."""

    trials: int
    references: Mapping[str, float]
    """The objectives, `loss` and numbers of the device (search/metrics.py): values that are just no longer of use."""
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

    def bounds(self) -> dict[str, float]:
        """What a model must keep to be on the front: every limit. A loss that is no longer of use still counts: a search that
        asked for too much has a front to learn that from."""
        return {**self.limits, **self.device_limits()}

    def device_limits(self) -> dict[str, float]:
        """By name, the device's numbers that the search depends on, and the largest that is of use."""
        names = [name for name in (*self.references, *self.limits) if name != "loss"]
        return {name: min(self.references.get(name, np.inf), self.limits.get(name, np.inf)) for name in names}


Predict = Callable[[str, Sequence[Mapping[str, Any]]], tuple[Any, Any]]
"""(metric, candidates in flat form) -> means and deviations."""
MakeOptimizer = Callable[[Space, SweepPlan, Predict], "Optimizer"]


class Sweep:
    """One search. `run` goes through the phases that are still to do."""

    def __init__(
        self, store: Store, space: Space, plan: SweepPlan, readings: Readings, scorers: Sequence[Score],
        make_optimizer: MakeOptimizer, tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`scorers` work side by side; each takes a candidate in flat form, with `seed` where it is scored again."""
        self.store, self.space, self.plan, self.readings = store, space, plan, readings
        self.scorers, self.make_optimizer, self.tick = scorers, make_optimizer, tick
        self.metrics = readings.metrics()
        self.needed = plan.device_limits()
        self.forecast = Forecast(readings, self.needed)
        if unknown := self.needed.keys() - {metric.name for metric in self.metrics}:
            raise SweepError(f"{sorted(unknown)[0]} is wanted and not measured; measured are "
                             f"{', '.join(metric.name for metric in self.metrics)}")  # fmt: skip

    def run(self) -> list[Trial]:
        """The confirmed front, best quality first."""
        self._enter("latency", after="space")
        if self.store.phase == "latency":
            with self.readings.farm:
                learn_latency(self.readings, self.plan.seed, self.needed)
            report_others(self.readings, self.needed)
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
        return front(self.store.trials("ok"), self.plan.references, self.plan.bounds())

    def candidate(self, trial: Trial) -> Candidate:
        return self.space.unflatten(trial.config["candidate"])

    def measured(self, jobs: Mapping[Point, Job]) -> dict[str, tuple[float, float]]:
        """By metric, (value, standard error or 0) of what the jobs at these points brought."""
        found = {metric.name: self.readings.value(jobs[metric.point], metric) for metric in self.metrics}
        return {name: value for name, value in found.items() if value is not None}

    def _enter(self, phase: str, after: str) -> None:
        if self.store.phase == after:
            self.store.phase = phase

    def _check_reachable(self) -> None:
        """Raises SweepError where even the best architecture that was met is over a limit."""
        for name, limit in self.needed.items():
            model, unit = self.forecast.models[name], self.readings.metric(name).unit
            best = min(model.readings, key=lambda reading: reading.value)
            low, _ = model.interval([best.config])
            if limit is not None and min(best.value, float(low[0])) > limit:
                raise SweepError(f"the best of {len(model.readings)} measured candidates has {name} {best.value:.4g} {unit}, "
                                 f"the limit is {limit:.4g}; raise the limit, shorten the prompt or allow smaller models")

    def _confirm(self) -> None:
        """Measure the front's models again and score them with another seed; what that gives is an event `confirmed`."""
        known = {event.trial for event in self.store.events("confirmed")}
        chosen = [trial for trial in spread(self.front(), list(self.plan.references), self.plan.confirm)
                  if trial.number not in known]  # fmt: skip
        with ThreadPoolExecutor(len(self.scorers) or 1) as pool:
            other = {"seed": self.plan.seed + 1}
            scores = [pool.submit(self.scorers[i % len(self.scorers)], {**trial.config["candidate"], **other})
                      for i, trial in enumerate(chosen) if self.scorers]  # fmt: skip
            for i, trial in enumerate(chosen):
                jobs = self.readings.submit_all(f"confirm/{trial.number}/{trial.key}", self.candidate(trial))
                ended = self.readings.wait(jobs)
                loss, reason = None, "; ".join(job.reason for job in ended if job.reason)
                try:
                    loss = scores[i].result()["loss"] if scores else None
                except (ValueError, RuntimeError) as error:  # what a scorer says of a candidate, or of itself
                    reason = str(error)
                results = dict(trial.results or {})
                again = self.measured(dict(zip(self.readings.plan.points, ended, strict=True)))
                detail: dict[str, Any] = {name: [results.get(name), value] for name, (value, _) in again.items()}
                self.store.event("confirmed", trial=trial.number, losses=[results.get("loss"), loss], reason=reason,
                                 errors={name: error for name, (_, error) in again.items()}, **detail)  # fmt: skip
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
        flats = [trial.config["candidate"] for trial in made]
        said = {name: sweep.forecast.predict(name, flats) for name in sweep.needed}
        for i, trial in enumerate(made):
            means: dict[str, Any] = {name: float(mean[i]) for name, (mean, _) in said.items()}
            deviations = {name: float(deviation[i]) for name, (_, deviation) in said.items()}
            sweep.store.event("predicted", key=trial.key, trial=trial.number, deviations=deviations, **means)

    def tell(self, token: Any, results: Results | None, noise: Results) -> None:
        raise_alarms(self.sweep.store, self.sweep.needed)
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
        readings, candidate = self.sweep.readings, self.sweep.space.unflatten(config)
        requests = [readings.request(candidate, point) for point in readings.plan.points]
        return [Measure(name=f"@{point}" if i else MAIN, request=request, device_class=readings.device_class,
                        expect=readings.expect(request))
                for i, (point, request) in enumerate(zip(readings.plan.points, requests, strict=True))]  # fmt: skip

    def results(self, measured: Mapping[str, Job], scores: Results) -> tuple[Results, Results]:
        points = self.sweep.readings.plan.points
        found = self.sweep.measured({point: measured[f"@{point}" if i else MAIN] for i, point in enumerate(points)})
        values = {name: value for name, (value, _) in found.items()}
        return {**scores, **values}, {name: error for name, (_, error) in found.items() if name in self.sweep.needed}


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
