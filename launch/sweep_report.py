"""report.html of an architecture search: the front, its models as drawings, and how far the numbers may be trusted.

One page, complete in itself, from a `SweepRecord` alone. It fetches nothing and runs no script; what the record lacks is said.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from launch.page import render_page, write_page
from launch.sweep_data import FrontPoint, LatencyReport, Metric, Pick, SweepRecord, TrialRecord
from launch.sweep_drawings import HATCH, drawing, spoken, widest
from launch.sweep_plots import drift_chart, drift_names, front_charts, hypervolume_chart, latency_chart, ranking_chart
from launch.sweep_text import (
    GATE_NAMES,
    best_of,
    experts,
    facts,
    interval,
    limit_words,
    pattern,
    percent,
    quantity,
    shape,
    tried_words,
    verdict,
)
from search.alarms import LIMIT
from search.space import Limits

MAX_DRAWINGS = 10


def write_sweep_report(record: SweepRecord, target: Path) -> Path:
    """Write the page, whole or not at all, and return its path."""
    return write_page(render_sweep(record), target)


def render_sweep(record: SweepRecord) -> str:
    """The page as text; the same for the same record."""
    trials = {trial.number: trial for trial in record.trials}
    scale = widest([model for trial in record.judged() if (model := trial.model())])
    front_scale = widest([model for point in record.front if (model := trials[point.trial].model())])
    charts = front_charts(record)
    shown = {hit.trial for chart in charts for hit in chart.hits}
    points = [point for point in record.front if point.trial in trials]
    points.sort(key=lambda point: _place(record, trials[point.trial]))
    return render_page(
        "sweep_template.html.j2",
        record=record,
        verdict=verdict(record),
        facts=facts(record),
        goals=[f"{'less' if goal.direction == 'min' else 'more'} {goal.words}" for goal in record.objectives],
        limits=[limit_words(limit) for limit in record.limits],
        limit_lines=[words for limit in record.limits if limit.name in {goal.name for goal in record.objectives}
                     and any((words := limit_words(limit)) not in " ".join(chart.beyond) for chart in charts)],
        reference=any("the reference" not in " ".join(chart.beyond) for chart in charts),
        bars=any(low < high for point in (*record.front, *record.dropped) for low, high in point.intervals.values()),
        over=len(record.within()) < len(record.judged()),
        charts=charts,
        tips={number: _tip(record, trials[number], scale) for number in shown},
        best=[(trial, _values(record, trial)) for trial in best_of(record, record.within())[:5]],
        estimated=any(not record.measured(trials[point.trial]) for point in points),
        hatch=HATCH,
        mixtures=any(model.moe for trial in record.trials if (model := trial.model())),
        drawings=[_tip(record, trials[point.trial], front_scale) for point in spread(points, MAX_DRAWINGS)],
        front=[_row(record, trials[point.trial], point) for point in points],
        dropped=[_row(record, trials[point.trial], point) for point in record.dropped if point.trial in trials],
        metrics=record.metrics(),
        predicted=[metric for metric in record.metrics() if any(metric.name in trials[p.trial].predicted for p in points)],
        latency=[(report, latency_chart(report, record.tried(report.metric.name)), _gates(report),
                  _tried(record, report)) for report in record.needed_models()],
        others=[report for report in record.latency if report not in record.needed_models()],
        hypervolume=hypervolume_chart(record),
        ranking=ranking_chart(record.ranking) if record.ranking else None,
        ended=_ended(record),
        drift=drift_chart(record.devices),
        drift_names=drift_names(record.devices),
        picks=[_pick(record, pick, trials.get(pick.trial)) for pick in record.picks],
        missing=missing(record),
    )  # fmt: skip


def spread(points: list[FrontPoint], count: int) -> list[FrontPoint]:
    """At most `count` of them, evenly, the first and the last included."""
    if len(points) <= count:
        return points
    return [points[round(place * (len(points) - 1) / (count - 1))] for place in range(count)]


def missing(record: SweepRecord) -> list[str]:
    """What a finished search would have and this record has not."""
    said = []
    if record.trials and not record.front:
        said.append("There is no front: no judged trial keeps every limit.")
    if record.front and not any(point.confirmed for point in record.front):
        said.append("The front was not measured again: intervals are those of the search, where they are known.")
    if predicted := sum(not record.measured(trial) for trial in record.judged()):
        said.append(f"Of {predicted} judged trials a value is predicted, not measured.")
    if not record.latency:
        said.append("There is no latency model, or none was fitted yet.")
    said += [f"Of the model of {report.metric.words} no held-out readings were stored: it was made by an older version."
             for report in record.latency if not report.pairs]  # fmt: skip
    said += [f"Trial {point.trial} was not confirmed in everything: {point.reason}" for point in record.front if point.reason]
    if record.ranking is None or len(record.ranking.pairs) < 2:
        said.append("Whether short training ranks as the final one does was not measured.")
    if not record.devices:
        said.append("No device has taken part.")
    if not record.picks:
        said.append("No model was exported.")
    said += [f"Trial {pick.trial} was exported and not measured after its training." for pick in record.picks
             if not pick.measured]  # fmt: skip
    other = Counter(trial.fidelity for trial in record.trials if trial.fidelity not in (None, record.fidelity))
    said += [f"{number} trials have numbers of fidelity {name} and are not compared with those of {record.fidelity}."
             for name, number in sorted(other.items(), key=str)]  # fmt: skip
    broken = sum(trial.model() is None for trial in record.trials)
    return said + ([f"{broken} trials have a stored config that is no model's."] if broken else [])


def _place(record: SweepRecord, trial: TrialRecord) -> tuple[float, int]:
    """The order of the table: along the second objective where there is one, from its better end."""
    goal = record.objectives[min(1, len(record.objectives) - 1)]
    return goal.sign * trial.values().get(goal.name, 0.0), trial.number


def _values(record: SweepRecord, trial: TrialRecord) -> list[tuple[str, str]]:
    """(label, value), marked where it is only predicted."""
    values = trial.values()
    return [(metric.words + (" (predicted)" if metric.name in values and metric.name not in (trial.results or {}) else ""),
             quantity(values.get(metric.name), metric)) for metric in record.metrics()]  # fmt: skip


def _tip(record: SweepRecord, trial: TrialRecord, scale: int) -> dict[str, Any]:
    model, front = trial.model(), {point.trial for point in record.front}
    dropped = trial.number in {point.trial for point in record.dropped}
    place = ("on the front" if trial.number in front else "dropped from the front" if dropped
             else "keeps the limits" if trial in record.within()
             else "trained briefly alone" if trial.short else "over a limit")  # fmt: skip
    return {"number": trial.number, "place": place, "values": _values(record, trial), "shape": shape(trial),
            "pattern": pattern(trial), "spoken": spoken(model) if model else "",
            "drawing": drawing(model, scale, f"Trial {trial.number}") if model else ""}  # fmt: skip


def _row(record: SweepRecord, trial: TrialRecord, point: FrontPoint) -> dict[str, Any]:
    model, results = trial.model(), trial.results or {}
    cells = []
    for metric in record.metrics():
        ends = point.intervals.get(metric.name)
        again = f"again {quantity(point.again[metric.name], metric)}" if metric.name in point.again else ""
        cells.append((quantity(results.get(metric.name), metric), interval(ends, metric) if ends and ends[0] < ends[1] else "",
                      again))  # fmt: skip
    errors = {metric.name: _error(trial.predicted.get(metric.name), results.get(metric.name), metric)
              for metric in record.metrics()}  # fmt: skip
    limits = Limits()
    return {"trial": trial, "confirmed": point.confirmed, "reason": point.reason, "model": model, "pattern": pattern(trial),
            "cells": cells, "errors": errors, "experts": experts(model).removeprefix(", ") if model else "",
            "bytes": quantity(model.weight_bytes(4, limits.group_size), Metric(name="", unit="bytes")) if model else None}


def _error(predicted: float | None, measured: float | None, metric: Metric) -> tuple[str, str, bool]:
    """(predicted, how far off what was measured, whether that is no alarm)."""
    if predicted is None:
        return quantity(None, metric), "", True
    if not measured:
        return quantity(predicted, metric), "", True
    off = predicted / measured - 1
    return quantity(predicted, metric), percent(off, sign=True), abs(off) <= LIMIT


def _gates(report: LatencyReport) -> list[dict[str, Any]]:
    """A row a figure: of the model, what it had to be, and the same of every proxy."""
    gates = {gate.name: gate for gate in report.gates}
    rows = []
    for name, label in GATE_NAMES.items():
        value = getattr(report.model, name)
        gate = gates.get(name)
        if value is None and gate is None:
            continue
        bounds = "" if gate is None else f"{gate.low:g} to {gate.high:g}"
        rows.append({"label": label, "value": value, "bounds": bounds, "passed": gate.passed if gate else None,
                     "proxies": [getattr(proxy, name) for proxy in report.proxies]})  # fmt: skip
    return rows


def _tried(record: SweepRecord, report: LatencyReport) -> dict[str, Any]:
    """How predictions of trials came out: in words, whether an alarm was due, and which were far off, the farthest first."""
    words, alarm = tried_words(record, report.metric)
    far = sorted((miss for miss in record.tried(report.metric.name) if abs(miss.off) > LIMIT), key=lambda miss: -abs(miss.off))
    named = ", ".join(f"{miss.trial} ({percent(miss.off, sign=True)})" for miss in far[:8])
    return {"words": words, "alarm": alarm, "far": named + (" \N{HORIZONTAL ELLIPSIS}" if len(far) > 8 else "")}


def _ended(record: SweepRecord) -> list[tuple[str, str, int, str]]:
    """(state, reason, how many, their numbers) of trials that brought nothing, the most frequent first."""
    groups: dict[tuple[str, str], list[int]] = {}
    for trial in record.trials:
        if trial.state in ("failed", "infeasible", "cancelled"):
            groups.setdefault((trial.state, trial.reason or "no reason was stored"), []).append(trial.number)
    found = []
    for (state, reason), numbers in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        listed = ", ".join(str(number) for number in numbers[:8]) + (" \N{HORIZONTAL ELLIPSIS}" if len(numbers) > 8 else "")
        found.append((state, reason, len(numbers), listed))
    return found


def _pick(record: SweepRecord, pick: Pick, trial: TrialRecord | None) -> dict[str, Any]:
    known = {metric.name: metric for metric in record.metrics()}
    rows = []
    for name in dict.fromkeys((*pick.expected, *pick.measured)):
        metric, expected = known.get(name, Metric(name=name)), pick.expected.get(name)
        value, measured = expected.value if expected else None, pick.measured.get(name)
        ends = (expected.low, expected.high) if expected and expected.low is not None and expected.high is not None else None
        rows.append({"label": metric.words, "expected": quantity(value, metric), "measured": quantity(measured, metric),
                     "ends": interval(ends, metric) if ends else "",
                     "inside": ends[0] <= measured <= ends[1] if ends and measured is not None else None,
                     "change": percent(measured / value - 1, sign=True) if measured is not None and value else ""})  # fmt: skip
    return {"pick": pick, "shape": shape(trial) if trial else "", "rows": rows}
