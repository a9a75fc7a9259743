"""The first stage of a search: buy latency readings until a model of the device may be trusted.

Readings are jobs of the farm, named by their architecture: started again, the stage finds those that were done.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeling.config import ModelConfig
from search.devices.base import MeasureRequest
from search.farm import Farm
from search.jobs import JobQueue
from search.records import Job
from search.space import Candidate, Space

if TYPE_CHECKING:
    from search.latency.model import LatencyModel, Reading

POLL_S = 0.05
POOL = 2000


@dataclass(frozen=True, kw_only=True)
class LatencyPlan:
    """What a reading is, and how many may be bought."""

    prompt_tokens: int
    decode_tokens: int = 16
    threads: int = 1
    kv: str = "int8"
    timeout_s: float = 600.0
    readings: int = 40
    """Bought at once, at random over the space."""
    more: int = 20
    """Bought at a time after that, where they are worth most, until the gates are met."""
    max_readings: int = 150
    runtime: str = "pocketforge"

    def request(self, model: Path) -> MeasureRequest:
        return MeasureRequest(model=model, prompt_tokens=self.prompt_tokens, decode_tokens=self.decode_tokens,
                              threads=self.threads, kv=self.kv, timeout_s=self.timeout_s)  # type: ignore[arg-type]  # fmt: skip


class KnownReadings:
    """What a sweep's database knows of latencies; nothing is measured."""

    def __init__(self, queue: JobQueue, space: Space, plan: LatencyPlan, device_class: str = "") -> None:
        self.queue, self.space, self.plan, self.device_class = queue, space, plan, device_class

    def counting(self) -> list[int]:
        """Jobs whose results count now, of the latency stage and of trials; of one that was done again the newest.

        A model is fitted on these: their ids, in this order, say later what was known.
        """
        first = [job.id for job in self.queue.jobs("ok", kind="measure")
                 if job.replaces is None and (job.trial is not None or job.name.startswith("latency/"))]  # fmt: skip
        newest = [self.queue.newest(job) for job in first]
        return [job.id for job in newest if job.state == "ok"]

    def reading(self, job: Job, config: ModelConfig, metric: str = "ttft_ms") -> Reading | None:
        """What the latency model learns from a job; None where it brought nothing."""
        from search.latency.model import Reading

        if job.state != "ok" or job.results is None or metric not in job.results:
            return None
        accepted = next(item for item in self.queue.readings(job.id) if item.role != "confirmation")
        error = accepted.errors.get(metric)
        return Reading(config=config, value=job.results[metric], std_error=error or None, fidelity=accepted.fidelity)

    def all(self, jobs: Sequence[int] | None = None) -> list[Reading]:
        """Of all jobs that count, or of those that did once."""
        keys = {trial.number: trial.key for trial in self.queue.store.trials()}
        found = []
        for job in (self.queue.job(number) for number in (self.counting() if jobs is None else jobs)):
            key = self._first(job).name.partition("/")[2] if job.trial is None else keys[job.trial]
            reading = self.reading(job, self.space.to_config(self.space.from_key(key)))
            found += [reading] if reading is not None else []
        return found

    def _first(self, job: Job) -> Job:
        """The job that this one measured again, if it did."""
        while job.replaces is not None:
            job = self.queue.job(job.replaces)
        return job

    def fit(self, jobs: Sequence[int] | None = None) -> LatencyModel:
        from search.latency.model import Key, LatencyModel

        plan = self.plan
        key = Key(device_class=self.device_class, runtime=plan.runtime, threads=plan.threads, metric="ttft",
                  context=plan.prompt_tokens)  # fmt: skip
        return LatencyModel.fit(key, self.all(jobs))


class Readings(KnownReadings):
    """Submits measurements of architectures, waits for them, and gives what came back."""

    def __init__(
        self, farm: Farm, space: Space, plan: LatencyPlan, build: Callable[[ModelConfig], Path], device_class: str = "",
        tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`build` writes (or finds) the packed file of an architecture; its weights do not matter."""
        super().__init__(farm.queue, space, plan, device_class)
        self.farm, self.build, self.tick = farm, build, tick

    def request(self, candidate: Candidate) -> MeasureRequest:
        return self.plan.request(self.build(self.space.to_config(candidate)))

    def submit(self, name: str, candidate: Candidate) -> int:
        return self.farm.submit(name, self.request(candidate), device_class=self.device_class)

    def wait(self, jobs: Sequence[int]) -> list[Job]:
        """The jobs, or what replaced them, when all have ended."""
        while True:
            newest = [self.queue.newest(job) for job in jobs]
            if all(job.ended for job in newest):
                return newest
            self.tick()
            time.sleep(POLL_S)


def learn_latency(readings: Readings, seed: int, limit: float | None = None) -> LatencyModel:
    """Buy readings until the gates are met or the plan's are used up; each fit is an event `latency_model`.

    Raises ValueError where too few readings came back to fit anything.
    """
    space, plan, queue = readings.space, readings.plan, readings.queue
    first = space.sample(random.Random(seed), plan.readings)
    jobs = _submit(readings, first)
    earlier = [job.id for job in queue.jobs(kind="measure") if job.name.startswith("latency/") and job.replaces is None]
    jobs = sorted({*jobs, *earlier})
    readings.wait(jobs)
    while True:
        model = readings.fit()
        report = model.report()
        queue.store.event("latency_model", report=report.to_dict(), bought=len(jobs))
        if report.passed or len(jobs) >= plan.max_readings:
            return model
        known = {queue.job(job).name.removeprefix("latency/") for job in jobs}
        pool = {space.key(c): c for c in space.sample(random.Random(f"{seed}/{len(jobs)}"), POOL)}
        fresh = [candidate for key, candidate in pool.items() if key not in known]
        count = min(plan.more, plan.max_readings - len(jobs), len(fresh))
        if count == 0:
            return model
        chosen = _worth_most(model, space, fresh, count, seed + len(jobs), limit)
        new = _submit(readings, chosen)
        readings.wait(new)
        jobs += new


def _submit(readings: Readings, candidates: Sequence[Candidate]) -> list[int]:
    """All or none: half of what a fit chose would, after a kill, be a fit of its own and choose others."""
    for candidate in candidates:
        readings.request(candidate)  # writes the files, which takes long, before the database is locked
    with readings.queue.store.transaction():
        return [readings.submit(f"latency/{readings.space.key(candidate)}", candidate) for candidate in candidates]


def _worth_most(model: Any, space: Space, pool: list[Candidate], count: int, seed: int, limit: float | None) -> list[Candidate]:
    """Quality is not known yet; more parameters stand for it, with a wide uncertainty."""
    from search.latency.acquire import choose_readings

    configs = [space.to_config(candidate) for candidate in pool]
    loss = -np.log([float(config.num_params()) for config in configs])
    picked = choose_readings(model, configs, loss, 0.3, count, seed=seed, latency_limit=limit)
    return [pool[i] for i in picked]
