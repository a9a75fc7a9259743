"""The report's line charts: what a stage logged over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.page_plots import GRID, NARROW, WIDE, colour, dress, svg
from launch.report_data import StageRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_POINTS = 600


@dataclass(frozen=True, kw_only=True)
class Line:
    x: Sequence[float]
    y: Sequence[float]
    stage: str
    faint: bool = False
    """Drawn thin behind the others: raw values under their running mean."""


def loss_chart(stage: StageRecord) -> str | None:
    """Training loss over optimizer steps: raw, and its running mean where there are enough points."""
    x, y = _points(stage, "loss")
    if not y:
        return None
    smooth = _running_mean(y, max(1, len(y) // 25))
    lines = [Line(x=x, y=smooth, stage=stage.name)]
    if len(y) >= 25:
        lines.insert(0, Line(x=x, y=y, stage=stage.name, faint=True))
    return draw(lines, x_label="optimizer step", y_label="loss")


def run_chart(stages: Sequence[StageRecord], key: str, y_label: str, *, log: bool = False) -> str | None:
    """One number over the steps of all stages, one after the other; a rule stands where a stage begins."""
    lines, starts, offset = [], [], 0.0
    for stage in stages:
        x, y = _points(stage, key)
        if y:
            starts.append(offset)
            lines.append(Line(x=[value + offset for value in x], y=y, stage=stage.name))
            offset += x[-1]
    if not lines:
        return None
    return draw(lines, x_label="optimizer step, all stages", y_label=y_label, size=NARROW, rules=starts[1:], log=log)


def draw(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = WIDE,
    rules: Sequence[float] = (),
    log: bool = False,
) -> str:
    """An `<svg>` element for the page."""

    def fill(axes: Axes) -> None:
        for rule in rules:
            axes.axvline(rule, color=GRID, linewidth=1, linestyle=(0, (3, 3)))
        for line in lines:
            marker = "o" if len(line.y) == 1 else None
            axes.plot(line.x, line.y, color=colour(line.stage), linewidth=0.8 if line.faint else 2,
                      alpha=0.35 if line.faint else 1, marker=marker, markersize=4, solid_capstyle="round")  # fmt: skip
        axes.margins(x=0.02)
        if log:
            _log_scale(axes)
        elif min(min(line.y) for line in lines) >= 0 and y_label != "loss":
            axes.set_ylim(0, 1.1 * max(max(line.y) for line in lines) or 1)
        dress(axes)

    salt = f"{y_label}{lines[0].stage}"
    return svg(fill, label=y_label, x_label=x_label, y_label=y_label, size=size, salt=salt)


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _points(stage: StageRecord, key: str) -> tuple[list[float], list[float]]:
    """Finite points, thinned evenly so that a long run does not swell the page."""
    points = [(line["step"], line[key]) for line in stage.metrics if math.isfinite(line.get(key, math.nan))]
    stride = max(1, math.ceil(len(points) / _MAX_POINTS))
    kept = points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
    return [x for x, _ in kept], [y for _, y in kept]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each point with up to `window` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i - window) : i + 1] for i in range(len(values)))]
