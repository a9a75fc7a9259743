"""The loop of a search: latency readings, then trials, then the front confirmed; all of it in one database.

A trial is scored (a short training), and measured where the latency model says that it may be on the front. The loop owns
the optimizer and is the database's only writer; killed at any point, it goes on from what is there: trials that were
running are scored again (a scorer finds what it finished), measurements are jobs that end once, and the optimizer is
told every answer once, in the order in which the database keeps them.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling.config import ModelConfig
from search.front import dominated, front, spread, values_of
from search.quality import Quality, Scorer
from search.readings import Readings, learn_latency
from search.records import State, Trial
from search.space import Candidate, Space
from search.store import Store

if TYPE_CHECKING:
    from search.latency.model import LatencyModel
    from search.optim.base import Optimizer

log = logging.getLogger(__name__)
class SweepError(ValueError):
    """The search cannot give what was asked for; says why and what to change."""


ALARM = 0.10
"""A prediction that is off by more is an event."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How much is tried, and what counts."""

    trials: int
    budget_tokens: int
    """Of one scoring."""
    references: Mapping[str, float]
    """`loss` and `ttft_ms`: values that are just no longer of use."""
    limits: Mapping[str, float] = field(default_factory=dict)
    batch: int = 8
    """Trials that may be open at once; when half of them are left, new ones are asked for."""
    confirm: int = 8
    """Models of the front that are measured and scored a second time."""
    seed: int = 0


class Sweep:
    """One search. `run` goes through the phases that are still to do."""

    def __init__(
        self, store: Store, space: Space, plan: SweepPlan, readings: Readings, scorer: Scorer, executor: Executor,
        make_optimizer: Callable[[Space, SweepPlan, Callable[..., Any]], Optimizer], tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.store, self.space, self.plan, self.readings = store, space, plan, readings
        self.scorer, self.executor, self.make_optimizer, self.tick = scorer, executor, make_optimizer, tick
        self.latency: LatencyModel | None = None

    def run(self) -> list[Trial]:
        """The confirmed front, best quality first."""
        if self.store.phase == "space":
            self.store.phase = "latency"
        self.latency = learn_latency(self.readings, self.plan.seed, self.plan.references.get("ttft_ms"))
        self._check_reachable()
        if self.store.phase == "latency":
            self.store.phase = "pareto"
        self._search()
        if self.store.phase == "pareto":
            self.store.phase = "confirm"
        self._confirm()
        self.store.phase = "done"
        return self.front()

    def front(self) -> list[Trial]:
        return front(self.store.trials("ok"), self.plan.references, self.plan.limits)

    def _check_reachable(self) -> None:
        """Raises ValueError where even the fastest architecture that was met is over the limit."""
        assert self.latency is not None
        fastest = min(self.latency.readings, key=lambda reading: reading.value)
        limit = min(self.plan.references["ttft_ms"], self.plan.limits.get("ttft_ms", np.inf))
        low, _ = self.latency.interval([fastest.config])
        if min(fastest.value, float(low[0])) > limit:
            raise SweepError(f"the fastest of {len(self.latency.readings)} measured candidates takes {fastest.value:.4g} ms, "
                             f"the limit is {limit:.4g}; raise the limit, shorten the prompt or allow smaller models")

    # --- trials ------------------------------------------------------------------------------------------------------

    def _predict(self, flats: Sequence[Mapping[str, Any]]) -> tuple[Any, Any]:
        """Milliseconds to the first token of candidates in flat form: mean and deviation."""
        assert self.latency is not None
        return self.latency.predict([self.space.to_config(self.space.unflatten(flat)) for flat in flats])

    def _search(self) -> None:
        optimizer = self.make_optimizer(self.space, self.plan, self._predict)
        if (snapshot := self.store.snapshot()) is not None:
            optimizer.load(json.loads(snapshot))
        scoring: dict[Future[Quality], Trial] = {}
        measuring: dict[int, Trial] = {}
        for trial in self.store.trials("waiting", "running"):
            scoring[self._score(trial)] = trial
        while True:
            self._tell(optimizer)
            started = len(self.store.trials())
            if started < self.plan.trials and len(scoring) + len(measuring) <= self.plan.batch // 2:
                wanted = min(self.plan.batch - len(scoring) - len(measuring), self.plan.trials - started)
                for trial in self._ask(optimizer, wanted):
                    scoring[self._score(trial)] = trial
            if not scoring and not measuring:
                return
            done, _ = wait(scoring, timeout=0.1, return_when=FIRST_COMPLETED) if scoring else (set(), None)
            for future in sorted(done, key=lambda one: scoring[one].number):
                trial = scoring.pop(future)
                if (job := self._scored(trial, future.result())) is not None:
                    measuring[job] = trial
            for job in [job for job in measuring if self.readings.queue.newest(job).ended]:
                self._measured(measuring.pop(job), job)
            if not scoring:
                time.sleep(0.05)
            self.tick()

    def _ask(self, optimizer: Optimizer, count: int) -> list[Trial]:
        """New trials, stored together with the optimizer that proposed them. Its tokens are the trials' numbers."""
        if measured := len(self.readings.all()) - len(self.latency.readings if self.latency else []):
            log.debug("refitting the latency model with %d new readings", measured)
            self.latency = self.readings.fit()
        asked = optimizer.ask(count)
        candidates = [(self.space.key(self.space.unflatten(flat)), flat) for _, flat in asked]
        made = self.store.add_trials(candidates, json.dumps(optimizer.state()))
        if [trial.number for trial in made] != [token for token, _ in asked]:
            raise SweepError("the database's trials and the optimizer's state are not of one sweep; restore the database")
        return made

    def _score(self, trial: Trial) -> Future[Quality]:
        self.store.start_trial(trial.number)
        config = self.space.to_config(self._candidate(trial))
        return self.executor.submit(self.scorer.score, config, self.plan.budget_tokens, self.plan.seed)

    def _scored(self, trial: Trial, quality: Quality) -> int | None:
        """The job that measures the trial, where it is worth one; else it has ended."""
        if quality.status != "ok" or quality.loss is None:
            state: State = "infeasible" if quality.status == "infeasible" else "failed"
            self.store.finish_trial(trial.number, state, reason=quality.reason)
            return None
        mean, deviation = (float(values[0]) for values in self._predict([trial.config]))
        results = {"loss": quality.loss, "predicted_ttft_ms": mean, "predicted_ttft_sd_ms": deviation,
                   "score_seconds": quality.seconds, "tokens": float(quality.tokens)}  # fmt: skip
        if quality.start_loss is not None:
            results["start_loss"] = quality.start_loss
        self.store.event("scored", trial=trial.number, results=results)
        hopeful = {"loss": quality.loss, "ttft_ms": mean - 2 * deviation}
        known = [values_of(other) for other in self.store.trials("ok")]
        if hopeful["ttft_ms"] > self.plan.references["ttft_ms"] or dominated(hopeful, known, ["loss", "ttft_ms"]):
            self.store.finish_trial(trial.number, "ok", results, {"predicted_ttft_ms": deviation})
            return None
        return self.readings.submit(f"trial/{trial.number}/{trial.key}", self._candidate(trial), trial.number)

    def _measured(self, trial: Trial, job: int) -> None:
        ended = self.readings.queue.newest(job)
        scored = [event.detail["results"] for event in self.store.events("scored") if event.trial == trial.number][-1]
        reading = self.readings.reading(ended, self.space.to_config(self._candidate(trial)))
        if reading is None:
            self.store.finish_trial(trial.number, ended.state if ended.state != "ok" else "failed", reason=ended.reason)
            return
        off = reading.value / scored["predicted_ttft_ms"] - 1
        if abs(off) > ALARM:
            self.store.event("prediction_off", trial=trial.number, off=off)
        self.store.finish_trial(trial.number, "ok", {**scored, "ttft_ms": reading.value}, {"ttft_ms": reading.std_error or 0.0})

    def _tell(self, optimizer: Optimizer) -> None:
        """Every ended trial that the optimizer does not know of. Failures are told as such, never as numbers."""
        for trial in self.store.trials("ok", "infeasible", "failed", "cancelled"):
            if trial.told is None:
                known = values_of(trial)
                values = {name: known[name] for name in (*self.plan.references, *self.plan.limits)} if known else None
                optimizer.tell(trial.number, values)
                self.store.tell(trial.number, json.dumps(optimizer.state()))

    def _candidate(self, trial: Trial) -> Candidate:
        return self.space.unflatten(trial.config)

    # --- the front, once more --------------------------------------------------------------------------------------

    def _confirm(self) -> None:
        """Measure and score the front's models again; what that gives is an event `confirmed` of the trial.

        A trial that was only predicted so far gets its measured latency, and may leave the front by it.
        """
        names = list(self.plan.references)
        for trial in spread(self.front(), names, self.plan.confirm):
            if any(event.trial == trial.number for event in self.store.events("confirmed")):
                continue
            config = self.space.to_config(self._candidate(trial))
            second = self.executor.submit(self.scorer.score, config, self.plan.budget_tokens, self.plan.seed + 1)
            job = self.readings.wait([self.readings.submit(f"confirm/{trial.number}/{trial.key}", self._candidate(trial))])[0]
            quality, reading = second.result(), self.readings.reading(job, config)
            if reading is not None and "ttft_ms" not in (trial.results or {}):
                self.store.amend_trial(trial.number, {**dict(trial.results or {}), "ttft_ms": reading.value},
                                       {"ttft_ms": reading.std_error or 0.0})  # fmt: skip
            self.store.event("confirmed", trial=trial.number, losses=[values_of(trial)["loss"], quality.loss],
                             ttft_ms=[values_of(trial).get("ttft_ms"), reading.value if reading is not None else None],
                             reason=quality.reason or job.reason)  # fmt: skip
            self.tick()


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
