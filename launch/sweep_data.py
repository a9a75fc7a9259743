"""What an architecture search says about itself, as plain values: input of its page, its live table, its JSON file.

What is not known is None or empty, never filled in; the page says what is missing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modeling.config import ModelConfig
from search.alarms import Miss

Numbers = Mapping[str, float]
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that trials have."""

    name: str
    """Its key in a trial's results, such as `ttft_ms`."""
    label: str = ""
    """In words, such as "time to first token"; empty for the name itself."""
    unit: str = ""
    """`ms` and `bytes` are shown in a unit that fits their size; others are shown as they are."""
    direction: Literal["min", "max"] = "min"

    @property
    def words(self) -> str:
        return self.label or self.name.replace("_", " ")

    @property
    def sign(self) -> int:
        """Times this, smaller is better."""
        return 1 if self.direction == "min" else -1


@dataclass(frozen=True, kw_only=True)
class Objective(Metric):
    """The first objective of a search is its quality: it is the y axis, and `best` means best in it."""

    reference: float
    """A value that is just no longer of use, in `unit`."""


@dataclass(frozen=True, kw_only=True)
class Limit(Metric):
    """What a model must keep to be of use at all."""

    value: float
    """The largest value allowed; the smallest where `direction` is `max`."""

    def kept_by(self, results: Numbers) -> bool:
        """Whether it is known to be kept."""
        return self.name in results and self.sign * results[self.name] <= self.sign * self.value


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A candidate, and what became of it."""

    number: int
    key: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig`."""
    state: str = "waiting"
    """waiting, running, ok, infeasible, failed, cancelled."""
    reason: str = ""
    results: Numbers | None = None
    noise: Numbers = field(default_factory=dict)
    """Standard error of a result, in its unit."""
    predicted: Numbers = field(default_factory=dict)
    """What a model said before it was measured, by the names of `results`; stands for a result that is not there."""
    fidelity: str | None = None
    """Of its measurements; None where none was made."""
    duplicate_of: int | None = None
    short: bool = False
    """Trained at the short budget alone: its loss is predicted from that one's, and it is on no front."""

    def values(self) -> dict[str, float]:
        """What the trial counts as: measured where it was measured, predicted where not. Empty without results."""
        return {} if self.results is None else {**self.predicted, **self.results}

    def model(self) -> ModelConfig | None:
        """None where the stored config is no model's."""
        try:
            return ModelConfig.from_plain(self.config)
        except (TypeError, ValueError):
            return None


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A trial that no other beats in every objective."""

    trial: int
    intervals: Mapping[str, Pair] = field(default_factory=dict)
    """95 % interval of a result, in its unit; of all measurements together where it was confirmed."""
    again: Numbers = field(default_factory=dict)
    """The same results of a second measurement and scoring, where there was one."""
    confirmed: bool = False
    """Measured and scored again after the search."""
    reason: str = ""
    """Why it was dropped from the front, or could not be confirmed."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A figure that must lie between two others before a latency model is used."""

    name: str
    value: float | None
    low: float
    high: float

    @property
    def passed(self) -> bool:
        return self.value is not None and self.low <= self.value <= self.high


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """How well something predicts a metric: the latency model, or a count that is often taken for it."""

    name: str
    r2: float | None = None
    mape: float | None = None
    """Mean absolute error, % of the value."""
    within_10: float | None = None
    """% of the readings."""
    spearman: float | None = None
    kendall: float | None = None
    coverage: float | None = None
    """% of the readings inside the 95 % band."""


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """A latency model on readings that it was not fitted to."""

    metric: Metric
    model: Predictor
    readings: int
    passed: bool
    gates: tuple[Gate, ...] = ()
    proxies: tuple[Predictor, ...] = ()
    pairs: tuple[Pair, ...] = ()
    """(measured, predicted) of readings, each held out of the fit, in the metric's unit."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Whether the cheap score orders candidates as the expensive one does."""

    label: str = "short training against the final one"
    metric: Metric
    kendall: float | None = None
    spearman: float | None = None
    pairs: tuple[Pair, ...] = ()
    """(predicted or short, final)."""


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """A device's part in the search."""

    name: str
    device_class: str = ""
    fidelity: str = ""
    state: str = "healthy"
    reason: str = ""
    measured: int = 0
    """Measurements taken, drifted ones included."""
    utilisation: float | None = None
    """Share of the time between the search's first and last measurement that it spent measuring."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Status of a measurement that failed -> how often."""
    drift: tuple[float, ...] = ()
    """Of every check with the sentinel, in order: how far off its first, as a share (0.05 is 5 %)."""
    quarantines: int = 0


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval, in the metric's unit."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pick:
    """A model that was exported."""

    trial: int
    path: str
    why: str = ""
    expected: Mapping[str, Estimate] = field(default_factory=dict)
    measured: Numbers = field(default_factory=dict)
    """After its training, by the same names."""


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """A search, whole."""

    name: str
    objectives: tuple[Objective, ...]
    limits: tuple[Limit, ...] = ()
    fidelity: str = ""
    """Of every number that counts here; a trial of another one is told of and not compared."""
    phase: str = "space"
    trials: tuple[TrialRecord, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    dropped: tuple[FrontPoint, ...] = ()
    """Of the front as the search left it, those that the confirmation spoke against, with the reason."""
    hypervolume: tuple[float, ...] = ()
    """After each ended trial, in the product of the objectives' units."""
    latency: tuple[LatencyReport, ...] = ()
    ranking: Ranking | None = None
    devices: tuple[DeviceReport, ...] = ()
    events: Mapping[str, int] = field(default_factory=dict)
    space_size: int | None = None
    picks: tuple[Pick, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("a search's record needs at least one objective; give its name and reference")

    def judged(self) -> list[TrialRecord]:
        """Trials with a finite value of every objective, be it predicted, each model once, of the record's fidelity."""
        return [trial for trial in self.trials if trial.state == "ok" and trial.duplicate_of is None
                and trial.fidelity in (None, self.fidelity) and all(
                    math.isfinite(trial.values().get(goal.name, math.nan)) for goal in self.objectives)]  # fmt: skip

    def within(self) -> list[TrialRecord]:
        """Judged trials that keep every limit, and were trained in full."""
        return [trial for trial in self.judged()
                if not trial.short and all(limit.kept_by(trial.values()) for limit in self.limits)]  # fmt: skip

    def tried(self, metric: str) -> list[Miss]:
        """Trials that were predicted before they were measured, each model once."""
        return [Miss(trial.number, trial.predicted[metric], trial.results[metric]) for trial in self.trials
                if trial.duplicate_of is None and trial.fidelity in (None, self.fidelity) and metric in trial.predicted
                and trial.results and trial.results.get(metric)]  # fmt: skip

    def measured(self, trial: TrialRecord) -> bool:
        """Whether nothing that counts of it is a prediction."""
        return all(metric.name in (trial.results or {}) for metric in self.metrics() if metric.name in trial.values())

    def metrics(self) -> list[Metric]:
        """Objectives, and what is only limited; each once."""
        return list({metric.name: metric for metric in (*self.limits, *self.objectives)}[name]
                    for name in dict.fromkeys(metric.name for metric in (*self.objectives, *self.limits)))  # fmt: skip

    def needed_models(self) -> list[LatencyReport]:
        """Reports of what is an objective or limited; the others are of what was measured beside it."""
        needed = {metric.name for metric in self.metrics()}
        return [report for report in self.latency if report.metric.name in needed]

    def to_json(self) -> str:
        """Numbers that are not finite are left out."""
        return json.dumps(_finite(dataclasses.asdict(self)), allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> SweepRecord:
        """Raises ValueError for what `to_json` did not write."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items() if not _is_gap(item)}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if _is_gap(value) else value


def _is_gap(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
