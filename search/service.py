"""The loop of a sweep: ask for candidates, have them measured and scored, tell the optimizer, and survive being killed.

Everything that was decided is in the database before anything follows from it. Asking and the new trials with their jobs are
one transaction, telling and the optimizer's state after it another, so a service that is killed anywhere and started again
goes on as if it had not been. This process is the only writer; devices and workers are threads' and processes' business.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from search.budgets import TwoBudgets
from search.devices.base import MeasureRequest
from search.farm import Farm
from search.jobs import JobQueue
from search.records import TERMINAL, WORST, Job, Results, Trial
from search.store import Store
from search.workers import Infeasible, Score, WorkerLost, checked

log = logging.getLogger(__name__)
POLL_S = 0.1
SCORE_LEASE_S = 7 * 86400.0
"""A training has no time limit of its own here: while the service lives its thread holds the lease, and a new service takes
all of them back."""


class SweepError(ValueError):
    """The search cannot give what was asked for; says why and what to change."""


class Optimizer(Protocol):
    """Ask and tell. The same state and the same answers in the same order give the same questions."""

    def ask(self, n: int) -> Sequence[tuple[Any, Mapping[str, Any]]]:
        """At most n pairs of a token (of JSON) and a candidate."""
        ...

    def tell(self, token: Any, results: Results | None, noise: Results) -> None:
        """None for a candidate without results: never a made-up number. A second answer with results corrects the first."""
        ...

    def state(self) -> str:
        """Everything, as text."""
        ...

    def load(self, state: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measurement that a trial needs."""

    name: str
    request: MeasureRequest
    device_class: str = ""
    expect: str | None = None


class Plan(Protocol):
    """What a sweep makes of a candidate."""

    def key(self, config: Mapping[str, Any]) -> str:
        """Canonical: equal for equal architectures."""
        ...

    def measures(self, config: Mapping[str, Any]) -> Sequence[Measure]:
        """Makes the model's file where it is not there. Raises ValueError for a candidate that cannot be built."""
        ...

    def results(self, measured: Mapping[str, Job], scores: Results) -> tuple[Results, Results]:
        """Objectives and their standard errors, from each measurement's job by its name and from the scores."""
        ...


class Service:
    """`run` does the sweep; `step` is one turn of it, for those who have a loop of their own."""

    def __init__(
        self, store: Store, farm: Farm, optimizer: Optimizer, plan: Plan, *, trials: int, scorers: Sequence[Score] = (),
        batch: int = 8, ordered: bool = True, max_attempts: int = 3,
        on_asked: Callable[[Sequence[Trial], int], None] = lambda made, wanted: None, budgets: TwoBudgets | None = None,
    ) -> None:  # fmt: skip
        """One thread a scorer. `ordered`: tell in the order of trials and ask again when all of a round are told, which
        makes a sweep repeatable; else tell as they end and keep `batch` of them open. `on_asked` notes what a question
        rested on, in the transaction that makes its trials of it. `budgets`: score briefly first, in full where it is
        worth it."""
        self.store, self.farm, self.optimizer, self.plan = store, farm, optimizer, plan
        self.trials, self.batch, self.ordered, self.max_attempts = trials, batch, ordered, max_attempts
        self.on_asked, self.budgets = on_asked, budgets
        self.scorers = list(scorers)
        self.queue = JobQueue(store)
        self._stop = threading.Event()
        returned = self.queue.recover()
        if (snapshot := store.snapshot()) is not None:
            optimizer.load(snapshot)
            log.info("going on with %d trials; %d jobs went back to the queue", store.num_trials(), returned)

    def run(self, on_step: Callable[[], None] = lambda: None) -> None:
        """Until all trials have ended and were told."""
        threads = [threading.Thread(target=self._score_loop, args=(place, score), daemon=True)
                   for place, score in enumerate(self.scorers)]  # fmt: skip
        with self.farm:
            for thread in threads:
                thread.start()
            try:
                while not self.step():
                    on_step()
                    time.sleep(POLL_S)
            finally:
                self._stop.set()
        for thread in threads:
            thread.join(5.0)

    def step(self) -> bool:
        """End what can be ended, tell it, ask for more. Whether the sweep is done."""
        open_trials = self.store.trials("waiting", "running")
        for trial in open_trials:
            self._settle(trial)
        self.store.settle_duplicates()
        self._amend()
        untold, made = self._tell(), self.store.num_trials()
        wanted = min(self.batch - untold, self.trials - made)
        if wanted > 0 and not (self.ordered and untold):
            self._ask(wanted)
            return False
        return made >= self.trials and untold == 0 and self.queue.num_open() == 0

    def _ask(self, wanted: int) -> None:
        asked = self.optimizer.ask(wanted)
        if not asked:
            raise SweepError(f"the optimizer has no candidate left after {self.store.num_trials()} trials; widen the space or "
                             "its limits, or ask for fewer trials")  # fmt: skip
        plans, told = [self._measures(config) for _, config in asked], len(self.store.told())
        with self.store.transaction():
            made = self.store.add_trials(
                [(self.plan.key(config), {"token": token, "candidate": dict(config), "told": told}) for token, config in asked],
                self.optimizer.state(),
            )
            self.on_asked(made, wanted)
            for trial, measures in zip(made, plans, strict=True):
                if isinstance(measures, str):
                    self.store.finish_trial(trial.number, "infeasible", reason=measures)
                elif trial.duplicate_of is None:
                    self._submit(trial, measures)

    def _measures(self, config: Mapping[str, Any]) -> Sequence[Measure] | str:
        try:
            return self.plan.measures(config)
        except ValueError as error:
            return f"cannot be built: {error}"

    def _submit(self, trial: Trial, measures: Sequence[Measure]) -> None:
        for measure in measures:
            self.farm.submit(f"trial/{trial.number}/{measure.name}", measure.request, trial=trial.number,
                             device_class=measure.device_class, expect=measure.expect)  # fmt: skip
        scorings = {"score": trial.config["candidate"]} if self.budgets is None else self.budgets.scorings(trial)
        for name, payload in scorings.items() if self.scorers else ():
            self._score(trial, name, payload)
        self.store.start_trial(trial.number)

    def _score(self, trial: Trial, name: str, payload: Mapping[str, Any]) -> None:
        self.queue.submit(f"trial/{trial.number}/{name}", payload, kind="score", trial=trial.number)

    def _newest(self, trial: int) -> dict[str, Job]:
        """By measurement name, the jobs whose results count."""
        return {job.name.rsplit("/", 1)[1]: self.queue.newest(job.id)
                for job in self.queue.jobs(trial=trial) if job.replaces is None}  # fmt: skip

    def _settle(self, trial: Trial) -> None:
        """End a trial whose jobs have: badly with the first that did, and then the others are not wanted either."""
        if trial.state != "running":
            return
        jobs = self._newest(trial.number)
        for state in WORST:
            bad = next((job for job in jobs.values() if job.state == state), None)
            if bad is not None:
                with self.store.transaction():
                    for job in jobs.values():
                        self.queue.cancel(job.id, f"trial {trial.number} is {state}")
                    self.store.finish_trial(trial.number, state, reason=f"{bad.name}: {bad.reason}")
                return
        if all(job.state in TERMINAL for job in jobs.values()):
            with self.store.transaction():
                if not self._promoted(trial, jobs):
                    self.store.finish_trial(trial.number, "ok", *self._results(trial, jobs))

    def _promoted(self, trial: Trial, jobs: Mapping[str, Job]) -> bool:
        """Whether a trial that was scored briefly goes on to its full scoring; which, and why, is an event `judged`."""
        if self.budgets is None or "short" not in jobs or "score" in jobs:
            return False
        measured, _ = self.plan.results(_measured(jobs), {})
        verdict = self.budgets.judge(trial, jobs["short"].results or {}, measured)
        self.store.event("judged", trial=trial.number, **asdict(verdict))
        if verdict.full:
            self._score(trial, "score", trial.config["candidate"])
        return verdict.full

    def _results(self, trial: Trial, jobs: Mapping[str, Job]) -> tuple[Results, Results]:
        full = jobs["score"].results if "score" in jobs else None
        scores: Results = full or {}
        deviations: Results = {}
        if self.budgets is not None and "short" in jobs:
            scores, deviations = self.budgets.scores(trial, jobs["short"].results or {}, full)
        results, noise = self.plan.results(_measured(jobs), scores)
        return results, {**noise, **deviations}

    def _amend(self) -> None:
        """Ended trials whose measurement was done again: the newer numbers count from now on, for the optimizer too."""
        for number in self.queue.remeasured():
            trial, jobs = self.store.trial(number), self._newest(number)
            if trial.state == "ok" and all(job.state == "ok" for job in jobs.values()):
                results, noise = self._results(trial, jobs)
                if results != trial.results:
                    self._correct(trial, results, noise)

    def _correct(self, trial: Trial, results: Results, noise: Results) -> None:
        same = [other for other in self.store.trials("ok") if other.duplicate_of == trial.number]
        for one in (trial, *same):
            snapshot = None
            if one.told is not None:
                self.optimizer.tell(one.config["token"], results, noise)
                snapshot = self.optimizer.state()
            self.store.amend_trial(one.number, results, noise, snapshot)

    def _tell(self) -> int:
        """How many trials are left untold."""
        untold = self.store.untold()
        left = len(untold)
        for trial in untold:
            if trial.state in TERMINAL:
                self.optimizer.tell(trial.config["token"], trial.results, trial.noise)
                self.store.tell(trial.number, self.optimizer.state())
                left -= 1
            elif self.ordered:
                break
        return left

    def _score_loop(self, place: int, score: Score) -> None:
        while not self._stop.is_set():
            lease = self.queue.lease(f"worker-{place}", "", SCORE_LEASE_S, kind="score")
            if lease is None:
                self._stop.wait(POLL_S)
                continue
            try:
                scores = checked(score(lease.job.payload))
            except (Infeasible, ValueError) as error:
                self.queue.finish(lease, "infeasible", reason=str(error))
            except Exception as error:
                if self._stop.is_set():  # its process was ended with the search: the next start takes the job back
                    return
                if not isinstance(error, WorkerLost):
                    log.exception("scoring %s", lease.job.name)
                attempt = lease.job.attempts + 1
                if attempt >= self.max_attempts:
                    self.queue.finish(lease, "failed", reason=f"{error} (attempt {attempt} of {self.max_attempts})")
                else:
                    self.queue.put_back(lease, str(error), counts=True)
            else:
                self.queue.finish(lease, "ok", scores)


def _measured(jobs: Mapping[str, Job]) -> dict[str, Job]:
    return {name: job for name, job in jobs.items() if job.kind == "measure"}
