"""Small SVG figures for a page, whose colours are CSS variables, so that one figure serves light and dark.

Matplotlib writes hexadecimal colours; stand-in values are drawn and then replaced by `var(--name)`.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from launch.page import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The page's variables. A stand-in colour is its variable's place; the values mean nothing, they only have to be distinct.
_NAMES = ("ink", "muted", "grid", "pretrain", "midtrain", "sft", "qat", "good", "bad", "card", "front", "within")
_STAND_INS = {name: f"#{place:02x}{place:02x}{place:02x}" for place, name in enumerate(_NAMES, 1)}
INK, MUTED, GRID = (_STAND_INS[name] for name in ("ink", "muted", "grid"))
WIDE, NARROW = (5.2, 2.8), (4.4, 2.7)  # inches of 72 points: near the width on a phone, so that text stays legible


def colour(name: str) -> str:
    """What to draw with so that the page shows its variable `--name`. Raises KeyError for one it has not."""
    return _STAND_INS[name]


def svg(
    draw: Callable[[Axes], None], *, label: str, x_label: str, y_label: str, size: tuple[float, float] = WIDE, salt: str = "",
) -> str:  # fmt: skip
    """An `<svg>` element without size, ids of its own, or anything fetched from elsewhere; `label` is read aloud."""
    return svg_with_places(draw, (), label=label, x_label=x_label, y_label=y_label, size=size, salt=salt)[0]


def svg_with_places(
    draw: Callable[[Axes], None], points: Sequence[tuple[float, float]], *, label: str, x_label: str, y_label: str,
    size: tuple[float, float] = WIDE, salt: str = "",
) -> tuple[str, list[tuple[float, float]]]:  # fmt: skip
    """The element, and where points of the data lie on it: as shares of its width from the left and height from the top."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": salt or label, "font.size": 11, "text.parse_math": False,
                  "axes.unicode_minus": True}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(visible(x_label), color=MUTED)
        axes.set_ylabel(visible(y_label), color=MUTED)
        draw(axes)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
        places = [(axes.transData + figure.transFigure.inverted()).transform(point) for point in points]
    return _for_page(buffer.getvalue(), label), [(float(x), 1 - float(y)) for x, y in places]


def dress(axes: Axes, *, grid: Literal["x", "y", "both"] = "y", whole_x: bool = True) -> None:
    """Only what helps reading: a quiet grid, few ticks, no frame. Last of all, when the data is in."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.tick_params(colors=MUTED, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=whole_x))
    if whole_x:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if max(abs(limit) for limit in axes.get_ylim()) >= 1000:
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif max(abs(limit) for limit in axes.get_ylim()) < 0.01:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _for_page(text: str, label: str) -> str:
    """Strip what belongs to a file of its own, name the colours, and keep ids apart from other charts of the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="[^"]+"', head)
    assert view, "matplotlib always writes a view box"
    for name, stand_in in _STAND_INS.items():
        body = body.replace(stand_in, f"var(--{name})")
    prefix = f"c{zlib.crc32(text.encode()):08x}-"
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\1{prefix}", body)
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg {view.group()} role="img" aria-label="{escape(visible(label))}">{body}'
