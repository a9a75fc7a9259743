"""The charts of a search's page: fronts, the latency model, the hypervolume, how a cheap score ranks, drift of devices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.page_plots import GRID, MUTED, NARROW, colour, dress, svg, svg_with_places
from launch.sweep_data import DeviceReport, LatencyReport, Objective, Pair, Ranking, SweepRecord, TrialRecord
from launch.sweep_text import limit_words, quantity, scale_of, volume_scale
from search.alarms import LIMIT, Miss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FRONT = (5.8, 4.5)
_SQUARE = (4.4, 3.6)
_LINES = ("pretrain", "midtrain", "sft", "qat")
FAR = 5.0
"""A reference more than so many times as far from the best trial as the worst trial is, is left out of its chart."""
MAX_HITS = 400
"""Trials that show their architecture under the pointer; a page of thousands would be slow."""


@dataclass(frozen=True)
class Hit:
    """A place on a chart that shows a trial: shares of its width and height from the upper left."""

    left: float
    top: float
    trial: int
    on_front: bool


@dataclass(frozen=True)
class FrontChart:
    title: str
    svg: str
    hits: tuple[Hit, ...]
    outside: int
    """Trials too far off for the axes."""
    beyond: tuple[str, ...] = ()
    """Limits and references that are too far off, in words."""


def front_charts(record: SweepRecord) -> list[FrontChart]:
    """One a pair of objectives; with a single objective, its value over the trials. None without a judged trial."""
    if not record.judged():
        return []
    if len(record.objectives) == 1:
        return [_front_chart(record, None, record.objectives[0])]
    pairs = itertools.combinations(record.objectives, 2)
    return [_front_chart(record, x, y) for y, x in pairs]


def _front_chart(record: SweepRecord, x: Objective | None, y: Objective) -> FrontChart:
    judged = record.judged()
    points = {trial.number: (_value(trial, x), _value(trial, y)) for trial in judged}
    x_scale, x_label = _axis([a for a, _ in points.values()], x)
    y_scale, y_label = _axis([b for _, b in points.values()], y)
    points = {number: (a * x_scale, b * y_scale) for number, (a, b) in points.items()}
    x_view = (-0.6, max(a for a, _ in points.values()) + 0.6) if x is None else _view(
        [a for a, _ in points.values()], x, x_scale)
    y_view = _view([b for _, b in points.values()], y, y_scale)
    shown = {number: (a, b) for number, (a, b) in points.items()
             if x_view[0] <= a <= x_view[1] and y_view[0] <= b <= y_view[1]}  # fmt: skip
    front, gone = {point.trial for point in record.front}, {point.trial for point in record.dropped}
    kept = {trial.number for trial in record.within()}
    measured = {trial.number for trial in judged if record.measured(trial)}

    def draw(axes: Axes) -> None:
        axes.set_xlim(*x_view)
        axes.set_ylim(*y_view)
        _references(axes, record, x, y, x_scale, y_scale)
        over, within = ([place for number, place in shown.items() if number not in front | gone and (number in kept) == inside]
                        for inside in (False, True))  # fmt: skip
        axes.plot(*_columns(over), "o", mfc="none", mec=MUTED, mew=0.9, ms=4.5, alpha=0.7)
        axes.plot(*_columns(within), "o", color=colour("within"), mew=0, ms=4.8, alpha=0.75)
        axes.plot(*_columns([shown[number] for number in shown if number in gone]), "x", color=colour("bad"), mew=1.6, ms=7)
        best = sorted(place for number, place in shown.items() if number in front)
        if len(record.objectives) == 2 and x is not None and len(best) > 1:
            # Between two points of the front nothing better was found than the worse of the two.
            axes.step(*_columns(best), where="post" if x.sign == 1 else "pre", color=colour("front"), linewidth=1.4, alpha=0.8)
        _bars(axes, record, shown, x, y, x_scale, y_scale)
        sure = [shown[number] for number in shown if number in front and number in measured]
        axes.plot(*_columns([place for place in best if place not in sure]), "o", mfc=colour("card"), mec=colour("front"),
                  mew=1.5, ms=7)  # fmt: skip
        axes.plot(*_columns(sure), "o", color=colour("front"), mec=colour("card"), mew=1, ms=8)
        dress(axes, grid="both", whole_x=x is None)

    label = f"{y.words} against {x.words if x else 'trial number'}: {len(shown)} trials, {len(front)} on the front"
    order = sorted(shown, key=lambda number: (number in front, -y.sign * shown[number][1]))[-MAX_HITS:]
    text, places = svg_with_places(draw, [shown[number] for number in order], label=label, x_label=x_label, y_label=y_label,
                                   size=_FRONT if len(record.objectives) <= 2 else _SQUARE)  # fmt: skip
    hits = [Hit(left, top, number, number in front) for number, (left, top) in zip(order, places, strict=True)]
    title = f"{y.words} against {x.words}" if x else f"{y.words}, trial by trial"
    beyond = _beyond(record, ((x, x_scale, x_view), (y, y_scale, y_view)))
    return FrontChart(title, text, tuple(hits), len(points) - len(shown), beyond)


def _references(
    axes: Axes, record: SweepRecord, x: Objective | None, y: Objective, x_scale: float, y_scale: float
) -> None:
    """The limits as lines, the reference as a cross where both objectives have it."""
    for limit in record.limits:
        for goal, line, scale in ((x, axes.axvline, x_scale), (y, axes.axhline, y_scale)):
            if goal is not None and goal.name == limit.name:
                line(limit.value * scale, color=colour("bad"), linewidth=1.3, linestyle=(0, (5, 3)))
    if x is not None:
        axes.plot(x.reference * x_scale, y.reference * y_scale, "+", color=colour("bad"), ms=11, mew=1.8)
    else:
        axes.axhline(y.reference * y_scale, color=GRID, linewidth=1, linestyle=(0, (3, 3)))


def _bars(
    axes: Axes, record: SweepRecord, shown: dict[int, Pair], x: Objective | None, y: Objective, x_scale: float, y_scale: float
) -> None:
    """The intervals of the front and of what was dropped from it, where they are known."""
    caps: dict[str, Any] = {"color": colour("ink"), "linewidth": 1, "alpha": 0.55, "markersize": 6}
    for point in (*record.front, *record.dropped):
        if point.trial not in shown:
            continue
        wide, high = (point.intervals.get(x.name) if x is not None else None), point.intervals.get(y.name)
        a, b = shown[point.trial]  # the bars cross where the intervals have their middle: with a second value that is elsewhere
        a, b = sum(wide) / 2 * x_scale if wide else a, sum(high) / 2 * y_scale if high else b
        if wide:
            axes.plot([wide[0] * x_scale, wide[1] * x_scale], [b, b], marker="|", **caps)
        if high:
            axes.plot([a, a], [high[0] * y_scale, high[1] * y_scale], marker="_", **caps)


def _value(trial: TrialRecord, goal: Objective | None) -> float:
    return float(trial.number) if goal is None else trial.values()[goal.name]


def _axis(values: Sequence[float], goal: Objective | None) -> tuple[float, str]:
    if goal is None:
        return 1.0, "trial"
    factor, unit = scale_of(goal, max(abs(value) for value in (*values, goal.reference)))
    return factor, f"{goal.words} ({unit})" if unit else goal.words


def _view(values: Sequence[float], goal: Objective, scale: float) -> tuple[float, float]:
    """From the best to the reference or the worst, but no farther than two and a half times as far as the reference; without
    the reference where it would squeeze the trials into a corner."""
    signed = sorted(goal.sign * value for value in values)
    reference, spread = goal.sign * goal.reference * scale, signed[-1] - signed[0]
    if 0 < FAR * spread < reference - signed[0]:
        reference = signed[-1] + 0.1 * spread
    span = max(reference - signed[0], 0.0) or spread or abs(signed[0]) or 1.0
    worst = max(reference, min(signed[-1], signed[0] + 2.5 * span))
    margin = 0.05 * (worst - signed[0] or span)
    ends = goal.sign * (signed[0] - margin), goal.sign * (worst + margin)
    return min(ends), max(ends)


def _beyond(record: SweepRecord, goals: Sequence[tuple[Objective | None, float, Pair]]) -> tuple[str, ...]:
    """What would be drawn at a value that its axis does not reach. goals: objective, its scale, its axis."""
    found = []
    for goal, scale, (low, high) in goals:
        if goal is None:
            continue
        if not low <= goal.reference * scale <= high:
            found.append(f"the reference of {goal.words}, {quantity(goal.reference, goal)}")
        found += [f"the limit, {limit_words(limit)}" for limit in record.limits
                  if limit.name == goal.name and not low <= limit.value * scale <= high]  # fmt: skip
    return tuple(found)


def _columns(points: Sequence[Pair]) -> tuple[list[float], list[float]]:
    return [a for a, _ in points], [b for _, b in points]


def latency_chart(report: LatencyReport, tried: Sequence[Miss] = ()) -> str | None:
    """Predicted against measured, with the diagonal and 10 % to either side: readings as rings, trials as dots."""
    readings = [pair for pair in report.pairs if all(math.isfinite(value) for value in pair)]
    trials = [(miss.measured, miss.predicted) for miss in tried if math.isfinite(miss.off)]
    pairs = readings + trials
    if not pairs:
        return None
    scale, unit = scale_of(report.metric, max(max(pair) for pair in pairs))
    ends = (0.9 * scale * min(min(pair) for pair in pairs), 1.06 * scale * max(max(pair) for pair in pairs))

    def draw(axes: Axes) -> None:
        axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color=GRID, alpha=0.55, linewidth=0)
        axes.plot(ends, ends, color=MUTED, linewidth=1)
        for place, group in enumerate((readings, trials)):
            for near in (True, False):
                points = [(a * scale, b * scale) for a, b in group if _near(a, b) == near]
                tone = colour(("within", "front")[place] if near else "bad")
                axes.plot(*_columns(points), "o" if near else "D", color=tone, mfc=tone if place else "none",
                          mew=0 if place else 1.1, ms=5 if place else 5.5, alpha=0.8)  # fmt: skip
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        dress(axes, grid="both", whole_x=False)

    what = f"{report.metric.words} ({unit})" if unit else report.metric.words
    parts = [f"{sum(_near(a, b) for a, b in group)} of {len(group)} {name} within 10 %"
             for name, group in (("held-out readings", readings), ("trials", trials)) if group]  # fmt: skip
    label = f"predicted against measured {report.metric.words}: {', '.join(parts)}"
    return svg(draw, label=label, x_label=f"measured {what}", y_label="predicted, not fitted to it", size=_SQUARE)


def _near(measured: float, predicted: float) -> bool:
    return abs(predicted - measured) <= LIMIT * measured


def hypervolume_chart(record: SweepRecord) -> str | None:
    """After each ended trial."""
    if not record.hypervolume:
        return None
    factor, unit = volume_scale(record)
    values = [factor * value for value in record.hypervolume]

    def draw(axes: Axes) -> None:
        axes.step(range(1, len(values) + 1), values, where="post", color=colour("front"), linewidth=2,
                  marker="o" if len(values) == 1 else None)  # fmt: skip
        axes.set_ylim(0, 1.1 * max(values) or 1)
        axes.margins(x=0.02)
        dress(axes)

    label = f"hypervolume after each of {len(values)} trials, {values[-1]:.4g} at last"
    return svg(draw, label=label, x_label="ended trials", y_label=unit or "hypervolume", size=NARROW)


def ranking_chart(ranking: Ranking) -> str | None:
    """The final value against the cheap one; an order that holds rises everywhere."""
    pairs = [pair for pair in ranking.pairs if all(math.isfinite(value) for value in pair)]
    if not pairs:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(*_columns(pairs), "o", color=colour("front"), mec=colour("card"), mew=0.8, ms=7)
        dress(axes, grid="both", whole_x=False)

    label = f"{ranking.metric.words} of {len(pairs)} models: {ranking.label}"
    return svg(draw, label=label, x_label=f"short {ranking.metric.words}", y_label=f"final {ranking.metric.words}", size=NARROW)


def drift_chart(devices: Sequence[DeviceReport]) -> str | None:
    """How far every check with the sentinel was off the device's first, in %. The first four devices have a colour each."""
    checked = [device for device in devices if device.drift]
    if not checked:
        return None

    def draw(axes: Axes) -> None:
        axes.axhspan(-5, 5, color=GRID, alpha=0.5, linewidth=0)
        for place, device in enumerate(checked):
            axes.plot(range(1, len(device.drift) + 1), [100 * off for off in device.drift], marker="o", markersize=4,
                      linewidth=1.6, color=drift_colour(place))  # fmt: skip
        widest = max(8.0, 1.15 * max(abs(100 * off) for device in checked for off in device.drift))
        axes.set_ylim(-widest, widest)
        dress(axes)

    label = f"drift of the sentinel on {', '.join(device.name for device in checked)}"
    return svg(draw, label=label, x_label="check", y_label="off its first (%)", size=NARROW)


def drift_names(devices: Sequence[DeviceReport]) -> list[tuple[str, str]]:
    """(device, the page's variable of its line) in the order of the chart."""
    checked = [device for device in devices if device.drift]
    return [(device.name, _LINES[place] if place < len(_LINES) else "muted") for place, device in enumerate(checked)]


def drift_colour(place: int) -> str:
    return colour(_LINES[place]) if place < len(_LINES) else MUTED
