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


class Readings:
    """Submits measurements of architectures, waits for them, and gives what came back."""

    def __init__(
        self, farm: Farm, space: Space, plan: LatencyPlan, build: Callable[[ModelConfig], Path], device_class: str = "",
        tick: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`build` writes (or finds) the packed file of an architecture; its weights do not matter."""
        self.farm, self.space, self.plan, self.build = farm, space, plan, build
        self.device_class, self.tick = device_class, tick

    @property
    def queue(self) -> JobQueue:
        return self.farm.queue

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

    def reading(self, job: Job, config: ModelConfig, metric: str = "ttft_ms") -> Reading | None:
        """What the latency model learns from a job; None where it brought nothing."""
        from search.latency.model import Reading

        if job.state != "ok" or job.results is None or metric not in job.results:
            return None
        accepted = next(item for item in self.queue.readings(job.id) if item.role == "result")
        error = accepted.errors.get(metric)
        return Reading(config=config, value=job.results[metric], std_error=error or None, fidelity=accepted.fidelity)

    def all(self) -> list[Reading]:
        """Every reading there is, of this stage's jobs and of trials that were measured."""
        found = []
        trials = {trial.number: trial.key for trial in self.queue.store.trials()}
        for job in self.queue.jobs("ok", kind="measure"):
            kind, _, key = job.name.partition("/")
            if job.trial is not None:
                key = trials[job.trial]
            elif kind != "latency":
                continue
            if job.replaces is None:
                config = self.space.to_config(self.space.from_key(key))
                reading = self.reading(self.queue.newest(job.id), config)
                found += [reading] if reading is not None else []
        return found

    def fit(self) -> LatencyModel:
        from search.latency.model import Key, LatencyModel

        plan = self.plan
        key = Key(device_class=self.device_class, runtime=plan.runtime, threads=plan.threads, metric="ttft",
                  context=plan.prompt_tokens)  # fmt: skip
        return LatencyModel.fit(key, self.all())


def learn_latency(readings: Readings, seed: int, limit: float | None = None) -> LatencyModel:
    """Buy readings until the gates are met or the plan's are used up; each fit is an event `latency_model`.

    Raises ValueError where too few readings came back to fit anything.
    """
    from search.latency.evidence import evidence

    space, plan, queue = readings.space, readings.plan, readings.queue
    first = space.sample(random.Random(seed), plan.readings)
    jobs = [readings.submit(f"latency/{space.key(candidate)}", candidate) for candidate in first]
    earlier = [job.id for job in queue.jobs(kind="measure") if job.name.startswith("latency/") and job.replaces is None]
    jobs = sorted({*jobs, *earlier})
    readings.wait(jobs)
    while True:
        model = readings.fit()
        report = model.report()
        queue.store.event("latency_model", report=report.to_dict(), bought=len(jobs), **evidence(model))
        if report.passed or len(jobs) >= plan.max_readings:
            return model
        known = {queue.job(job).name.removeprefix("latency/") for job in jobs}
        pool = {space.key(c): c for c in space.sample(random.Random(f"{seed}/{len(jobs)}"), POOL)}
        fresh = [candidate for key, candidate in pool.items() if key not in known]
        count = min(plan.more, plan.max_readings - len(jobs), len(fresh))
        if count == 0:
            return model
        chosen = _worth_most(model, space, fresh, count, seed + len(jobs), limit)
        new = [readings.submit(f"latency/{space.key(candidate)}", candidate) for candidate in chosen]
        readings.wait(new)
        jobs += new


def _worth_most(model: Any, space: Space, pool: list[Candidate], count: int, seed: int, limit: float | None) -> list[Candidate]:
    """Quality is not known yet; more parameters stand for it, with a wide uncertainty."""
    from search.latency.acquire import choose_readings

    configs = [space.to_config(candidate) for candidate in pool]
    loss = -np.log([float(config.num_params()) for config in configs])
    picked = choose_readings(model, configs, loss, 0.3, count, seed=seed, latency_limit=limit)
    return [pool[i] for i in picked]
