"""Loss against active parameters: a panel for each number of tokens, a curve for each E, lines of equal memory, runs as dots.

Memory is that of models built by the rules of `search/scaling_design.py`, read off between their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launch.page import count, render_page, write_page
from launch.page_plots import colour, svg
from launch.rundir import beside, writing
from launch.scaling_text import gigabytes
from search.scaling_files import Run
from search.scaling_law import BILLION, PUBLISHED_CHOICE, Choice, LawError, ScalingLaw
from search.scaling_shapes import WIDTH_A_LAYER, WIDTH_STEP, Caps, Rules, active_params, build, costs_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = NDArray[np.float64]
_SIZE = (5.2, 3.9)
_LIGHT = {"ink": "#171a21", "muted": "#5d6675", "grid": "#dfe3ea", "card": "#ffffff"}
_CURVES = "viridis"
MOST_PANELS = 4
MEMORIES = 4


@dataclass(frozen=True)
class Panel:
    """One number of training tokens."""

    tokens: float
    active: Array
    """Where curves are drawn, in parameters."""
    curves: dict[int, Array]
    """Predicted loss by E."""
    memory: list[tuple[float, Array, Array]]
    """Bytes, and where the curves of rising E have so many: parameters and losses."""
    runs: tuple[Run, ...]
    law: ScalingLaw
    inside: tuple[float, float]
    """Where N was fitted, in parameters."""


def write_plot(
    law: ScalingLaw, runs: Sequence[Run], path: Path, *, tokens: Sequence[float] = (), vocabulary: int | None = None,
    context: int = 0,
) -> None:  # fmt: skip
    """A page (`.html`) or a picture (`.png`), whole or not at all. Raises LawError for runs the law cannot be drawn with."""
    shown = panels(law, runs, tokens, vocabulary, context)
    with writing(path):
        if path.suffix == ".png":
            _write_png(shown, path)
            return
        charts = [(f"{count(panel.tokens)} tokens", _chart(panel)) for panel in shown]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_page(render_page("scaling_template.html.j2", law=law, charts=charts, runs=runs, legend=_legend(shown),
                               memory=_memory_words(context)), path)  # fmt: skip


def _chart(panel: Panel) -> str:
    def draw(axes: Axes) -> None:
        _draw(axes, panel, colour)

    label = f"loss against active parameters at {count(panel.tokens)} tokens"
    return svg(draw, label=label, x_label=_X, y_label=_Y, size=_SIZE)


_X, _Y = "active parameters", "loss (nats a token)"


def panels(
    law: ScalingLaw, runs: Sequence[Run], tokens: Sequence[float], vocabulary: int | None, context: int
) -> list[Panel]:
    """What is drawn, as numbers."""
    part = law.common
    levels = sorted(tokens) or sorted({run.tokens for run in runs}) or [part.tokens[0] * BILLION, part.tokens[1] * BILLION]
    if len(levels) > MOST_PANELS:
        levels = [levels[round(i * (len(levels) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    low, high = part.active[0] * BILLION, part.active[1] * BILLION
    active = np.geomspace(low / 1.3, high * 1.3, 60)
    found = sorted({int(run.experts) for run in runs}) or [e for e in (1, 2, 4, 8, 16, 32) if e <= part.experts[1]]
    choice = max(law.parts, key=lambda item: law.parts[item].runs, default=PUBLISHED_CHOICE)
    known = {run.vocab_size for run in runs if run.vocab_size}
    rules = Rules(vocab_size=vocabulary or (max(known) if known else 128_256))
    sizes = {experts: _sizes(experts, choice, rules, context, law.counts_embedding) for experts in found}
    result = []
    for level in levels:
        curves = {experts: law.loss(active, level, experts, choice) for experts in found}
        here = tuple(run for run in runs if math.isclose(run.tokens, level, rel_tol=0.02))
        result.append(Panel(level, active, curves, _equal_memory(law, level, choice, sizes, (active[0], active[-1])), here, law,
                            (low, high)))  # fmt: skip
    return result


def _sizes(experts: int, choice: Choice, rules: Rules, context: int, embedding: bool) -> tuple[Array, Array]:
    """Active parameters and bytes of models of rising width."""
    caps, found = Caps(tokens=1, context=max(context, 1)), []
    for hidden in range(WIDTH_STEP, rules.max_hidden + 1, WIDTH_STEP):
        heads = hidden // rules.head_dim
        kv_heads = max(divisor for divisor in range(1, 5) if heads % divisor == 0)
        layers = math.ceil(hidden / WIDTH_A_LAYER)
        try:
            config = build(hidden, layers, kv_heads, experts, choice, rules, max(context, 1))
        except LawError:
            continue
        cache = 0 if context else config.kv_bytes(1, caps.kv_bits)
        found.append((active_params(config, embedding), costs_of(config, 1, caps)["memory_bytes"] - cache))
    columns = np.array(found, float).T
    return columns[0], columns[1]


def _equal_memory(
    law: ScalingLaw, tokens: float, choice: Choice, sizes: dict[int, tuple[Array, Array]], view: tuple[float, float]
) -> list[tuple[float, Array, Array]]:
    """Lines over the curves of rising E, for round numbers of bytes between the cheapest and the dearest shown."""
    ends = [np.exp(np.interp(np.log(view), np.log(active), np.log(memory))) for active, memory in sizes.values()]
    least, most = min(end[0] for end in ends), max(end[1] for end in ends)
    lines = []
    for memory in _round(np.geomspace(least * 1.5, most / 1.5, MEMORIES)):
        points = []
        for experts, (active, used) in sizes.items():
            place = float(np.exp(np.interp(np.log(memory), np.log(used), np.log(active))))
            if used[0] <= memory <= used[-1] and view[0] <= place <= view[1]:
                points.append((place, float(law.loss(place, tokens, experts, choice))))
        if len(points) > 1:
            columns = np.array(points).T
            lines.append((memory, columns[0], columns[1]))
    return lines


def _round(values: Array) -> list[float]:
    """One digit each, without repeats."""
    return sorted({float(f"{value:.0e}") for value in values})


def _draw(axes: Axes, panel: Panel, paint: Callable[[str], str]) -> None:
    """paint: the colour of a name, the page's variable or a plain one."""
    from matplotlib import colormaps

    shades = _shades(list(panel.curves), colormaps[_CURVES])
    for experts, losses in panel.curves.items():
        inner = (panel.active >= panel.inside[0]) & (panel.active <= panel.inside[1])
        axes.plot(panel.active, losses, color=shades[experts], linewidth=1, linestyle=(0, (2, 2)), alpha=0.7)
        axes.plot(panel.active[inner], losses[inner], color=shades[experts], linewidth=1.8)
    for memory, active, losses in panel.memory:
        axes.plot(active, losses, color=paint("muted"), linewidth=1, linestyle=(0, (5, 2)))
        axes.annotate(gigabytes(memory), (active[-1], losses[-1]), color=paint("muted"), fontsize=8, xytext=(2, -8),
                      textcoords="offset points")  # fmt: skip
    for run in panel.runs:
        axes.plot(run.size(panel.law.counts_embedding), run.loss, "o", color=shades.get(int(run.experts), paint("ink")),
                  mec=paint("card"), mew=0.8, ms=6.5)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(panel.active[0], panel.active[-1])
    _dress(axes, paint)


def _shades(experts: list[int], scale: Any) -> dict[int, str]:
    from matplotlib.colors import to_hex

    return {value: to_hex(scale(0.1 + 0.75 * place / max(1, len(experts) - 1))) for place, value in enumerate(experts)}


def _dress(axes: Axes, paint: Callable[[str], str]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    axes.tick_params(which="both", colors=paint("muted"), length=0)
    axes.grid(axis="both", color=paint("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(paint("grid"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _legend(shown: Sequence[Panel]) -> list[tuple[int, str]]:
    from matplotlib import colormaps

    return list(_shades(list(shown[0].curves), colormaps[_CURVES]).items())


def _memory_words(context: int) -> str:
    return "INT4 weights" + (f" and an INT8 cache of {context} tokens" if context else "")


def _write_png(shown: Sequence[Panel], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(_SIZE[0] * len(shown), _SIZE[1]), layout="constrained", dpi=120)
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, panel in zip(axes, shown, strict=True):
        _draw(axis, panel, _LIGHT.__getitem__)
        axis.set_title(f"{count(panel.tokens)} tokens", fontsize=11)
        axis.set_xlabel(_X, color=_LIGHT["muted"])
    axes[0].set_ylabel(_Y, color=_LIGHT["muted"])
    handles = [Line2D([], [], color=shade, label=f"E = {experts}") for experts, shade in _legend(shown)]
    axes[-1].legend(handles=handles, frameon=False, fontsize=9)
    with beside(path) as part:
        figure.savefig(part, format="png")
