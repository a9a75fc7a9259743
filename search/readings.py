"""The first stage of a search: buy latency readings until a model of the device may be trusted.

Readings are jobs of the farm, named by their architecture: started again, the stage finds those that were done.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling.config import ModelConfig
from search.devices.base import MeasureRequest
from search.farm import Farm
from search.jobs import JobQueue
from search.metrics import DeviceMetric, Point, metrics_at, parse_metric
from search.records import WORST, Job, StoredReading
from search.reference_output import Expect
from search.space import Candidate, Space

if TYPE_CHECKING:
    from search.latency.model import LatencyModel
    from search.latency.reading import Reading

POLL_S = 0.05
POOL = 2000
MIN_REPORTED = 20
"""Readings of a metric that nothing waits for, below which a report would say little."""


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """What a reading is, and how many may be bought."""

    prompt_tokens: int
    decode_tokens: int = 16
    threads: int = 1
    also: tuple[Point, ...] = ()
    """Where else every architecture is measured."""
    kv: str = "int8"
    timeout_s: float = 600.0
    readings: int = 40
    """Architectures measured at once, at random over the space."""
    more: int = 20
    """Measured at a time after that, where they are worth most, until the gates are met."""
    max_readings: int = 150
    runtime: str = "pocketforge"

    @property
    def main(self) -> Point:
        return Point(self.prompt_tokens, self.threads)

    @property
    def points(self) -> tuple[Point, ...]:
        """The main one first, each once."""
        return tuple(dict.fromkeys((self.main, *self.also)))

    def request(self, model: Path, point: Point | None = None) -> MeasureRequest:
        at = point or self.main
        return MeasureRequest(model=model, prompt_tokens=at.prompt_tokens, decode_tokens=self.decode_tokens,
                              threads=at.threads, kv=self.kv, timeout_s=self.timeout_s)  # type: ignore[arg-type]  # fmt: skip


class KnownReadings:
    """What a sweep's database knows of a device's numbers; nothing is measured."""

    def __init__(
        self, queue: JobQueue, space: Space, plan: LatencyPlan, times: tuple[str, str], device_class: str = ""
    ) -> None:
        """`times`: what measurements call the time to the first token and the decode rate (`Policy.times`)."""
        self.queue, self.space, self.plan, self.times, self.device_class = queue, space, plan, times, device_class

    def metric(self, name: str) -> DeviceMetric:
        return parse_metric(name, self.plan.main)

    def metrics(self) -> list[DeviceMetric]:
        """Everything that is measured."""
        return metrics_at(self.plan.points, self.plan.main)

    def counting(self) -> list[int]:
        """Jobs whose results count now, of the latency stage and of trials; of one that was done again the newest.

        Models are fitted on these: their ids, in this order, say later what was known. Not of trials that ended badly: whether
        one was measured before its training diverged is chance, and an ordered search must not depend on that.
        """
        bad = {trial.number for trial in self.queue.store.trials(*WORST)}
        first = [job.id for job in self.queue.jobs("ok", kind="measure") if job.replaces is None and job.trial not in bad
                 and (job.trial is not None or job.name.startswith("latency/"))]  # fmt: skip
        newest = [self.queue.newest(job) for job in first]
        return [job.id for job in newest if job.state == "ok"]

    def value(self, job: Job, metric: DeviceMetric) -> tuple[float, float] | None:
        """(value, standard error or 0) of what a job measured; None where it brought nothing."""
        if job.state != "ok" or job.results is None:
            return None
        return metric.read(job.results, self._accepted(job).errors, self.times)

    def _accepted(self, job: Job) -> StoredReading:
        """Of a job that is ok: its result, also where that was found to have drifted since."""
        return next(item for item in self.queue.readings(job.id) if item.role != "confirmation")

    def all(self, metric: DeviceMetric, jobs: Sequence[int] | None = None) -> list[Reading]:
        """Every reading at the metric's point, of all jobs that count or of those that did once."""
        from search.latency.reading import Reading

        keys = {trial.number: trial.key for trial in self.queue.store.trials()}
        found = []
        for job in (self.queue.job(number) for number in (self.counting() if jobs is None else jobs)):
            name, _, at = self._first(job).name.partition("@")
            value = self.value(job, metric) if (not at if metric.main else at == str(metric.point)) else None
            if value is not None:
                key = name.removeprefix("latency/") if job.trial is None else keys[job.trial]
                found.append(Reading(config=self.space.to_config(self.space.from_key(key)), value=value[0],
                                     std_error=value[1] or None, fidelity=self._accepted(job).fidelity))  # fmt: skip
        return found

    def _first(self, job: Job) -> Job:
        """The job that this one measured again, if it did."""
        while job.replaces is not None:
            job = self.queue.job(job.replaces)
        return job

    def fit(self, metric: DeviceMetric, jobs: Sequence[int] | None = None) -> LatencyModel:
        """Raises ValueError where too few readings came back to fit anything."""
        from search.latency.model import LatencyModel
        from search.latency.reading import Key

        key = Key(device_class=self.device_class, runtime=self.plan.runtime, threads=metric.point.threads, metric=metric.kind,
                  context=metric.point.prompt_tokens)  # fmt: skip
        return LatencyModel.fit(key, self.all(metric, jobs))


class Readings(KnownReadings):
    """Submits measurements of architectures, waits for them, and gives what came back."""

    def __init__(
        self, farm: Farm, space: Space, plan: LatencyPlan, build: Callable[[ModelConfig], Path], device_class: str = "",
        tick: Callable[[], None] = lambda: None, expect: Expect = lambda request: None,
    ) -> None:  # fmt: skip
        """`build` writes (or finds) the packed file of an architecture; its weights do not matter. `expect` gives the checksum
        of its right output, where that is known."""
        super().__init__(farm.queue, space, plan, farm.policy.times, device_class)
        self.farm, self.build, self.tick, self.expect = farm, build, tick, expect

    def request(self, candidate: Candidate, point: Point | None = None) -> MeasureRequest:
        return self.plan.request(self.build(self.space.to_config(candidate)), point)

    def submit(self, name: str, candidate: Candidate, point: Point | None = None) -> int:
        """The job of that name at that point."""
        at = "" if point in (None, self.plan.main) else f"@{point}"
        return self.submit_request(name + at, self.request(candidate, point))

    def submit_request(self, name: str, request: MeasureRequest) -> int:
        return self.farm.submit(name, request, device_class=self.device_class, expect=self.expect(request))

    def submit_all(self, name: str, candidate: Candidate) -> list[int]:
        """A job a point, the main one first."""
        return [self.submit(name, candidate, point) for point in self.plan.points]

    def wait(self, jobs: Sequence[int]) -> list[Job]:
        """The jobs, or what replaced them, when all have ended."""
        while True:
            newest = [self.queue.newest(job) for job in jobs]
            if all(job.ended for job in newest):
                return newest
            self.tick()
            time.sleep(POLL_S)


def learn_latency(readings: Readings, seed: int, limits: Mapping[str, float | None]) -> dict[str, LatencyModel]:
    """Buy readings until the gates of every metric in `limits` are met or the plan's are used up; each fit is an event
    `latency_model`.

    limits: by name, what is just acceptable, or None where that is not known. Raises ValueError where too few readings came
    back to fit anything.
    """
    space, plan, queue = readings.space, readings.plan, readings.queue
    metrics = [readings.metric(name) for name in limits]
    first = space.sample(random.Random(seed), plan.readings)
    _buy(readings, first)
    while True:
        jobs = [job for job in queue.jobs(kind="measure") if job.name.startswith("latency/") and job.replaces is None]
        readings.wait([job.id for job in jobs])
        known = {job.name.removeprefix("latency/").partition("@")[0] for job in jobs}
        models = {metric.name: readings.fit(metric) for metric in metrics}
        passed = {name: _report(readings, name, model, len(known)) for name, model in models.items()}
        pool = {space.key(c): c for c in space.sample(random.Random(f"{seed}/{len(known)}"), POOL)}
        fresh = [candidate for key, candidate in pool.items() if key not in known]
        count = min(plan.more, plan.max_readings - len(known), len(fresh))
        if all(passed.values()) or count < 1:
            return models
        worst = next(name for name, good in passed.items() if not good)
        _buy(readings, _worth_most(models[worst], space, fresh, count, seed + len(known), limits[worst]))


def _buy(readings: Readings, candidates: Sequence[Candidate]) -> None:
    """All or none: half of what a fit chose would, after a kill, be a fit of its own and choose others."""
    for candidate in candidates:
        for point in readings.plan.points:
            readings.expect(readings.request(candidate, point))  # files and checksums first: the database is then locked
    with readings.queue.store.transaction():
        for candidate in candidates:
            readings.submit_all(f"latency/{readings.space.key(candidate)}", candidate)


def report_others(readings: Readings, known: Container[str]) -> None:
    """Fit and report what else was measured, which nothing waits for: every number at every point."""
    for metric in readings.metrics():
        if metric.name not in known and len(found := readings.all(metric)) >= MIN_REPORTED:
            _report(readings, metric.name, readings.fit(metric), len(found))


def _report(readings: Readings, name: str, model: LatencyModel, bought: int) -> bool:
    from search.latency.evidence import evidence

    report = model.report()
    readings.queue.store.event("latency_model", metric=name, report=report.to_dict(), bought=bought, **evidence(model))
    return report.passed


def _worth_most(model: Any, space: Space, pool: list[Candidate], count: int, seed: int, limit: float | None) -> list[Candidate]:
    """Quality is not known yet; more parameters stand for it, with a wide uncertainty. Of a mixture these are the geometric
    mean of all and those in use."""
    from search.latency.acquire import choose_readings

    configs = [space.to_config(candidate) for candidate in pool]
    sizes = np.log([[float(config.num_params()), float(config.num_active_params())] for config in configs])
    loss = -0.5 * (sizes[:, 0] + sizes[:, 1])
    picked = choose_readings(model, configs, loss, 0.3, count, seed=seed, latency_limit=limit)
    return [pool[i] for i in picked]
