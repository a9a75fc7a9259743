"""What `latency_model.py` measures: a space of small models, and a folder of databases with everything that was read.

Each setting (threads, prompt, clock) has a database of its own; started again, a setting goes on where it was stopped.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from modeling.config import ModelConfig
from modeling.identity import config_key
from search.devices import open_device
from search.farm import Farm
from search.latency.reading import Reading
from search.members import Member, Policy
from search.metrics import parse_metric
from search.readings import LatencyPlan, Readings, learn_latency
from search.records import StoredReading
from search.space import Candidate, Space
from search.statistics import median, standard_error
from search.store import Store
from search.sweep import build_once
from stages.random_packed import write_pocket

SPACE = Space.from_dict({
    "num_layers": [4, 6, 8, 10, 12], "hidden_size": list(range(192, 641, 64)), "ffn_size": list(range(512, 2049, 256)),
    "num_heads": [4, 6, 8, 12], "num_kv_heads": [1, 2, 4], "head_dim": [32, 64], "block_repeat": [1, 2],
    "fixed": {"vocab_size": 8192, "max_positions": 2048, "window": 128},
})  # fmt: skip
"""4 to 60 million parameters; layers with full, window or no attention; blocks run once or twice."""
MIXTURES = Space.from_dict({
    "num_layers": [2, 3, 4, 6], "hidden_size": [128, 192, 256, 320, 384], "ffn_size": [256, 512, 768, 1024],
    "num_heads": [4, 6], "num_kv_heads": [1, 2], "head_dim": [32, 64], "experts": [1, 2, 4, 8], "granularity": [1, 2, 4, 8],
    "shared_experts": [0, 1, 2, 4], "attention": ["full", "window"],
    "fixed": {"vocab_size": 8192, "max_positions": 2048, "window": 128},
})  # fmt: skip
"""With `--experts`: dense models and mixtures of up to 64 experts, of which 1 to 8 are active; 1 to 60 million parameters."""
KV = "int8"
FIRST = 40
"""Readings before the first fit."""
Clock = Literal["wall", "processor"]
PARTS = ("latency", "held", "again")
"""Readings to learn from; of architectures that no model saw; of some of those once more, last."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all readings of a database have in common."""

    prompt_tokens: int
    decode_tokens: int = 16
    threads: int = 1
    processor_time: bool = False
    """Jobs end with processor time, which other programs disturb less; wall times are among their samples."""
    experts: bool = False
    """Of the space with mixtures of experts."""
    seed: int = 0

    @property
    def name(self) -> str:
        clock = "processor" if self.processor_time else "wall"
        return f"{self.threads}x{self.prompt_tokens}-{clock}{'-experts' if self.experts else ''}"

    @property
    def space(self) -> Space:
        return MIXTURES if self.experts else SPACE

    def spec(self) -> dict[str, Any]:
        """What the database is of; that of a dense space as it was before there were others."""
        values = {name: value for name, value in asdict(self).items() if name != "experts" or value}
        return {"setting": values, "space": self.space.to_dict()}

    @property
    def policy(self) -> Policy:
        """Repeats are short: batches of processes tell more than repeats within one."""
        return Policy(warmup=1, min_repeats=3 if self.processor_time else 5, max_repeats=15, retry_s=1.0, reconnect_s=0.0,
                      processor_time=self.processor_time)  # fmt: skip

    def plan(self, max_readings: int) -> LatencyPlan:
        return LatencyPlan(prompt_tokens=self.prompt_tokens, decode_tokens=self.decode_tokens, threads=self.threads, kv=KV,
                           timeout_s=60.0, readings=min(FIRST, max_readings), more=20, max_readings=max_readings)  # fmt: skip


class OutOfTimeError(Exception):
    """The round is over; the next one goes on."""


def settings_in(folder: Path) -> list[Setting]:
    """Of the databases that lie there, by name."""
    found = []
    for path in sorted(folder.glob("*.db")):
        if match := re.fullmatch(r"(\d+)x(\d+)-(processor|wall)(-experts)?", path.stem):
            with closing(Store.read(path)) as store:
                found.append(Setting(**store.spec["setting"]))
                assert found[-1].name == match.group(0)
    return found


@contextmanager
def opened(folder: Path, setting: Setting, max_readings: int, until: float) -> Iterator[Readings]:
    """To be measured with; at `until` (seconds since 1970) waiting raises OutOfTimeError."""

    def tick() -> None:
        if time.time() > until:
            raise OutOfTimeError

    with closing(Store.open(folder / f"{setting.name}.db", setting.spec())) as store:
        farm = Farm(store, [Member(open_device("local"))], policy=setting.policy)
        farm.queue.recover()
        build = build_once(folder / "shapes", write_pocket, config_key)
        yield Readings(farm, setting.space, setting.plan(max_readings), build, tick=tick)


def measure(
    folder: Path, setting: Setting, *, readings: int, held_out: int, again: int, minutes: float, conditions: Mapping[str, str]
) -> bool:  # fmt: skip
    """Buy readings as a search does; then more at random up to `readings`; then what they are held against.

    False where the time was over before the end. Conditions and load are kept with the readings.
    """
    until, load, space = time.time() + 60 * minutes, os.getloadavg()[0], setting.space
    with opened(folder, setting, readings, until) as bought:
        try:
            with bought.farm:
                learn_latency(bought, setting.seed, {"ttft_ms": None})
                taken = {job.name for job in bought.queue.jobs(kind="measure") if job.name.startswith("latency/")}
                more = [c for c in space.sample(random.Random(f"more {setting.seed}"), readings)
                        if f"latency/{space.key(c)}" not in taken]  # fmt: skip
                _take(bought, "latency", more[: max(0, readings - len(taken))])
                unseen = [c for c in held_out_candidates(space, held_out) if f"latency/{space.key(c)}" not in taken]
                _take(bought, "held", unseen)
                _take(bought, "again", unseen[:again])
        except OutOfTimeError:
            return False
        finally:
            bought.queue.store.event("round", load=[load, os.getloadavg()[0]], conditions=dict(conditions))
    return True


def held_out_candidates(space: Space, count: int) -> list[Candidate]:
    """The same ones for every setting."""
    return space.sample(random.Random("held out"), count)


def _take(readings: Readings, part: str, candidates: list[Candidate]) -> None:
    readings.wait([readings.submit(f"{part}/{readings.space.key(candidate)}", candidate) for candidate in candidates])


def build_ahead(folder: Path, space: Space, held_out: int, readings: int) -> None:
    """Write the packed files that are sure to be wanted, so that a quiet round is not spent on it."""
    build = build_once(folder / "shapes", write_pocket, config_key)
    seed = Setting(prompt_tokens=1).seed
    for candidate in [*space.sample(random.Random(seed), FIRST), *space.sample(random.Random(f"more {seed}"), readings),
                      *held_out_candidates(space, held_out)]:  # fmt: skip
        build(space.to_config(candidate))


@dataclass(frozen=True)
class Read:
    """A reading as it was bought."""

    key: str
    reading: Reading


def load(folder: Path, setting: Setting, metric: str, clock: Clock) -> dict[str, list[Read]]:
    """Part -> readings in the order they were asked for; `metric` as search/metrics.py names it.

    Empty lists where the setting does not have that clock.
    """
    found: dict[str, list[Read]] = {part: [] for part in PARTS}
    if clock == "processor" and not setting.processor_time:
        return found
    with closing(Store.read(folder / f"{setting.name}.db")) as store:
        names = {row["id"]: row["name"] for row in store.rows("SELECT id, name FROM jobs WHERE state = 'ok' ORDER BY id")}
        for job, name in names.items():
            part, _, key = name.partition("/")
            stored = next(item for item in stored_readings(store, job) if item.role == "result")
            value = _value(stored, setting, metric, clock)
            if value is not None:
                config = setting.space.to_config(setting.space.from_key(key))
                reading = Reading(config=config, value=value[0], std_error=value[1] or None, fidelity=stored.fidelity)
                found[part].append(Read(key, reading))
    return found


def stored_readings(store: Store, job: int) -> list[StoredReading]:
    from search.jobs import JobQueue

    return JobQueue(store).readings(job)


def _value(stored: StoredReading, setting: Setting, metric: str, clock: Clock) -> tuple[float, float] | None:
    """(value, standard error): the job's own, or, for wall times of a job judged by processor time, from its samples."""
    asked = parse_metric(metric, setting.plan(FIRST).main)
    if clock == "processor" or not setting.processor_time or asked.kind == "peak_memory":
        return asked.read(stored.values, stored.errors, setting.policy.times)
    names = ("ttft_ms", "decode_tok_s")
    values, errors = {}, {}
    for name in names:
        raw = [sample[name] for batch in stored.samples for sample in batch if not sample["warmup"] and sample[name]]
        values[name], errors[name] = median(raw), standard_error(raw)
    return asked.read(values, errors, names)


def configs_of(reads: list[Read]) -> list[ModelConfig]:
    return [read.reading.config for read in reads]


def gates_met(folder: Path, setting: Setting) -> int | None:
    """How many readings had been bought when the gates first let the model through; None where they never did."""
    return next((bought for bought, passed, _ in fits(folder, setting) if passed), None)


def fits(folder: Path, setting: Setting) -> list[tuple[int, bool, list[str]]]:
    """(readings bought, whether the gates were met, what was not) of every fit of the buying stage."""
    with closing(Store.read(folder / f"{setting.name}.db")) as store:
        return [(event.detail["bought"], event.detail["report"]["passed"], event.detail["report"]["failures"])
                for event in store.events("latency_model")]


def rounds(folder: Path, setting: Setting) -> list[dict[str, Any]]:
    """Load and conditions of each time it was measured."""
    with closing(Store.read(folder / f"{setting.name}.db")) as store:
        return [dict(event.detail) for event in store.events("round")]
