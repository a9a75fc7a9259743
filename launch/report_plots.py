"""The report's line charts: small SVG figures whose colours are CSS variables, so that one serves light and dark.

Matplotlib writes hexadecimal colours; stand-in values are drawn and then replaced by `var(--name)`.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launch.report_data import StageRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-in colour -> the page's CSS variable. The values mean nothing; they only have to be distinct.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_STAGE_COLOURS = {"pretrain": "#040404", "midtrain": "#050505", "sft": "#060606", "qat": "#070707"}
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {
    colour: f"--{stage}" for stage, colour in _STAGE_COLOURS.items()
}
_WIDE, _NARROW = (5.2, 2.8), (4.4, 2.7)  # inches of 72 points: near the width on a phone, so that text stays legible
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
    return draw(lines, x_label="optimizer step, all stages", y_label=y_label, size=_NARROW, rules=starts[1:], log=log)


def draw(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = _WIDE,
    rules: Sequence[float] = (),
    log: bool = False,
) -> str:
    """An `<svg>` element without size, ids of its own, or anything fetched from elsewhere."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": f"{y_label}{lines[0].stage}", "font.size": 11,
             "text.parse_math": False, "axes.unicode_minus": True}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        for rule in rules:
            axes.axvline(rule, color=_GRID, linewidth=1, linestyle=(0, (3, 3)))
        for line in lines:
            marker = "o" if len(line.y) == 1 else None
            axes.plot(line.x, line.y, color=_STAGE_COLOURS[line.stage], linewidth=0.8 if line.faint else 2,
                      alpha=0.35 if line.faint else 1, marker=marker, markersize=4, solid_capstyle="round")  # fmt: skip
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        elif min(min(line.y) for line in lines) >= 0 and y_label != "loss":
            axes.set_ylim(0, 1.1 * max(max(line.y) for line in lines) or 1)
        _dress(axes, x_label, y_label)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _for_page(buffer.getvalue(), y_label)


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Only what helps reading: a quiet grid, few ticks, no frame."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel(x_label, color=_MUTED)
    axes.set_ylabel(y_label, color=_MUTED)
    axes.tick_params(colors=_MUTED, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(x=0.02)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if max(abs(limit) for limit in axes.get_ylim()) >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif max(abs(limit) for limit in axes.get_ylim()) < 0.01:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _for_page(svg: str, label: str) -> str:
    """Strip what belongs to a file of its own, name the colours, and keep ids apart from other charts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view = re.search(r'viewBox="[^"]+"', head)
    assert view, "matplotlib always writes a view box"
    for colour, name in _VARIABLES.items():
        body = body.replace(colour, f"var({name})")
    prefix = f"c{zlib.crc32(svg.encode()):08x}-"
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{prefix}", body)
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg {view.group()} role="img" aria-label="{label}">{body}'


def _points(stage: StageRecord, key: str) -> tuple[list[float], list[float]]:
    """Finite points, thinned evenly so that a long run does not swell the page."""
    points = [(line["step"], line[key]) for line in stage.metrics if math.isfinite(line.get(key, math.nan))]
    stride = max(1, math.ceil(len(points) / _MAX_POINTS))
    kept = points[::stride] + (points[-1:] if (len(points) - 1) % stride else [])
    return [x for x, _ in kept], [y for _, y in kept]


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each point with up to `window` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i - window) : i + 1] for i in range(len(values)))]
