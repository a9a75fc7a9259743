"""A search's record from its database, which is only read: trials, front, hypervolume, devices, events."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from launch.sweep_confirm import confirm, confirmations
from launch.sweep_data import (
    DeviceReport,
    FrontPoint,
    Gate,
    LatencyReport,
    Limit,
    Metric,
    Numbers,
    Objective,
    Pair,
    Pick,
    Predictor,
    Ranking,
    SweepRecord,
    TrialRecord,
)
from modeling.config import ModelConfig
from search.metrics import Point, parse_metric

if TYPE_CHECKING:
    from search.records import Event
    from search.store import Store

K = TypeVar("K")
FIGURES = ("r2", "mape", "within_10", "spearman", "kendall", "coverage")
ROUTINE = ("asked", "told", "predicted", "latency_model")
"""Events that every search has at every step: its memory, nothing that a reader of the page should know of."""
PREDICTED = "predicted_"
"""Before the name of a result that is a prediction."""


def from_store(
    store: Store, *, name: str, objectives: Sequence[Objective], limits: Sequence[Limit] = (), space_size: int | None = None,
    to_model: Callable[[Mapping[str, Any]], ModelConfig] | None = None, predicted: Mapping[int, Numbers] | None = None,
    fidelity: str | None = None, latency: Sequence[LatencyReport] = (), ranking: Ranking | None = None,
    picks: Sequence[Pick] = (), notes: Sequence[str] = (),
) -> SweepRecord:  # fmt: skip
    """What the database knows, with what only the caller does.

    to_model: a trial's stored config -> its model; None where it holds the fields of `ModelConfig` already. predicted: by
    trial, by names of results. fidelity: that of most measured trials where it is not given. Results called
    `predicted_NAME` are predictions of NAME. Events give the rest: `confirmed`, and the last `latency_model` where no
    `latency` is given.
    """
    fidelities = _fidelities(store)
    chosen = fidelity or _most(fidelities.values()) or _most(device.fidelity for device in store.devices()) or ""
    trials = []
    for trial in store.trials():
        config = dict(trial.config) if to_model is None else asdict(to_model(trial.config))
        results, guessed = _split(trial.results or {})
        trials.append(TrialRecord(
            number=trial.number, key=trial.key, config=config, state=trial.state, reason=trial.reason,
            results=results if trial.results is not None else None, noise=_split(trial.noise)[0],
            predicted=guessed | _numbers((predicted or {}).get(trial.number, {})), fidelity=fidelities.get(trial.number),
            duplicate_of=trial.duplicate_of, short="loss" in guessed and "loss" not in results))  # fmt: skip
    events = store.events()
    if not latency:
        latency = _reported(events, (*objectives, *limits))
    record = SweepRecord(
        name=name, objectives=tuple(objectives), limits=tuple(limits), fidelity=chosen, phase=store.phase, trials=tuple(trials),
        latency=tuple(latency), ranking=ranking, devices=_devices(store, events),
        events=dict(sorted(Counter(event.kind for event in events if event.kind not in ROUTINE).items())),
        space_size=space_size, picks=tuple(picks),
        notes=tuple(notes))  # fmt: skip
    order = {trial.number: trial.told for trial in store.trials() if trial.told is not None}
    front, dropped = confirm(front_of(record), confirmations(store, trials), objectives, limits)
    return replace(record, front=front, dropped=dropped, hypervolume=hypervolumes(record, order))


def front_of(record: SweepRecord) -> tuple[FrontPoint, ...]:
    """The undominated of the trials that keep the limits, in order of their numbers."""
    import numpy as np

    from search.optim.hypervolume import front

    within = record.within()
    if not within:
        return ()
    values = np.array([_signed(trial, record.objectives) for trial in within], dtype=np.float64)
    found = sorted((within[int(i)] for i in front(values)), key=lambda trial: trial.number)
    return tuple(FrontPoint(trial=trial.number, intervals=_intervals(trial)) for trial in found)


def hypervolumes(record: SweepRecord, order: Mapping[int, int] | None = None) -> tuple[float, ...]:
    """Dominated volume below the reference after each ended trial; only trials that keep the limits count.

    order: trial -> the place of its answer; ended trials that have none come last, by number.
    """
    import numpy as np

    from search.optim.hypervolume import hypervolume

    reference = np.array([goal.sign * goal.reference for goal in record.objectives], dtype=np.float64)
    counted = {trial.number: trial for trial in record.within()}
    ended = [trial for trial in record.trials if trial.state not in ("waiting", "running")]
    ended.sort(key=lambda trial: ((order or {}).get(trial.number, math.inf), trial.number))
    rows: list[list[float]] = []
    found, volume = [], 0.0
    for trial in ended:
        if trial.number in counted:
            new = _signed(trial, record.objectives)
            if not any(all(a <= b for a, b in zip(old, new, strict=True)) for old in rows):
                rows = [old for old in rows if not all(b <= a for a, b in zip(old, new, strict=True))] + [new]
                volume = hypervolume(np.array(rows), reference)
        found.append(volume)
    return tuple(found)


def _signed(trial: TrialRecord, objectives: Sequence[Objective]) -> list[float]:
    values = trial.values()
    return [goal.sign * values[goal.name] for goal in objectives]


def _intervals(trial: TrialRecord) -> dict[str, Pair]:
    results = trial.results or {}
    return {name: (results[name] - 1.96 * error, results[name] + 1.96 * error)
            for name, error in trial.noise.items() if name in results and error > 0}  # fmt: skip


def _split(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(results, predictions by the names of results)."""
    numbers = _numbers(values)
    guessed = {name.removeprefix(PREDICTED): value for name, value in numbers.items() if name.startswith(PREDICTED)}
    return {name: value for name, value in numbers.items() if not name.startswith(PREDICTED)}, guessed


def _reported(events: Sequence[Event], metrics: Sequence[Metric]) -> tuple[LatencyReport, ...]:
    """Of every number of the device the last stored report, those in `metrics` first. An older search's event names no
    metric, for it had one, and has no pairs and no proxies."""
    last = {str(event.detail.get("metric", "ttft_ms")): event.detail for event in events if event.kind == "latency_model"
            and isinstance(event.detail.get("report"), Mapping)}  # fmt: skip
    known = {metric.name: metric for metric in metrics}
    named = [known.get(name) or _device_metric(name) for name in sorted(last, key=lambda name: (name not in known, name))]
    return tuple(_report(metric, last[metric.name]) for metric in named if metric is not None)


def _device_metric(name: str) -> Metric | None:
    """A number that is no objective and no limit; None for what this version does not know."""
    try:
        found = parse_metric(name, Point(1))
    except ValueError:
        return None
    return Metric(name=name, label=found.label(), unit=found.unit)


def _report(metric: Metric, detail: Mapping[str, Any]) -> LatencyReport:
    from search.latency.gates import LIMITS

    said, counts = detail["report"], detail.get("proxies")
    figures = _numbers(said)
    ranks = {str(name): _numbers(found) for name, found in (counts.items() if isinstance(counts, Mapping) else ())
             if isinstance(found, Mapping)}  # fmt: skip
    return LatencyReport(
        metric=metric, readings=int(figures.get("readings", 0)), passed=said.get("passed") is True,
        model=Predictor(name=str(said.get("kind", "?")), **{name: figures.get(name) for name in FIGURES}),
        gates=tuple(Gate(name=name, value=figures.get(name), low=low, high=high) for name, (low, high) in LIMITS.items()),
        proxies=tuple(Predictor(name=name, spearman=found.get("spearman"), kendall=found.get("kendall"))
                      for name, found in ranks.items()),
        pairs=_pairs(detail.get("held_out")),
    )  # fmt: skip


def _pairs(values: Any) -> tuple[Pair, ...]:
    """What is a pair of positive numbers."""
    rows = [_numbers(dict(enumerate(row))) for row in (values if isinstance(values, list) else ()) if isinstance(row, list)]
    return tuple((row[0], row[1]) for row in rows if len(row) == 2 and min(row.values()) > 0)


def _numbers(values: Mapping[K, Any]) -> dict[K, float]:
    """Finite numbers only: a database that was written elsewhere may hold anything."""
    return {name: float(value) for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)}  # fmt: skip


def _fidelities(store: Store) -> dict[int, str]:
    """Of every trial that was measured; of its newest accepted measurement."""
    found = store.rows("SELECT trial, fidelity FROM measurements JOIN jobs ON jobs.id = job WHERE trial IS NOT NULL"
                       " AND role = 'result' ORDER BY measurements.id")  # fmt: skip
    return {row["trial"]: row["fidelity"] for row in found}


def _most(values: Iterable[str]) -> str | None:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _devices(store: Store, events: Sequence[Event]) -> tuple[DeviceReport, ...]:
    from search.devices.base import Status

    failures = set(get_args(Status)) - {"ok"}
    rows = {row["device"]: row for row in store.rows(
        "SELECT device, count(*) AS measured, sum(ended - started) AS busy, min(started) AS first, max(ended) AS last"
        " FROM measurements WHERE started > 0 AND ended >= started GROUP BY device")}  # fmt: skip
    span = max((row["last"] for row in rows.values()), default=0.0) - min((row["first"] for row in rows.values()), default=0.0)
    found = []
    for device in store.devices():
        mine = [event for event in events if event.device == device.name]
        row = rows.get(device.name)
        found.append(DeviceReport(
            name=device.name, device_class=device.device_class, fidelity=device.fidelity, state=device.state,
            reason=device.reason, measured=row["measured"] if row else 0,
            utilisation=(row["busy"] if row else 0.0) / span if span > 0 else None,
            failures=dict(sorted(Counter(event.kind for event in mine if event.kind in failures).items())),
            drift=tuple(_numbers(event.detail)["off"] for event in mine
                        if event.kind == "sentinel" and "off" in _numbers(event.detail)),
            quarantines=sum(event.kind in ("quarantined", "retired") for event in mine)))  # fmt: skip
    return tuple(found)
