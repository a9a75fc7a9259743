"""What the project's pages share: templates beside this file, how numbers read, and writing a page whole or not at all.

A page fetches nothing (a content policy forbids it), and text from outside, such as a name or what a model generated, is
escaped.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
DASH = "\N{EN DASH}"


def render_page(template: str, **values: Any) -> str:
    """A template of this folder, filled in; a name that it lacks is an error, not an empty place."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters |= {"count": count, "number": number, "duration": duration, "visible": visible}
    return environment.get_template(template).render(**values)


def write_page(page: str, target: Path) -> Path:
    """Whole or not at all. Returns `target`."""
    beside = target.with_name(f".{target.name}.part")
    beside.write_text(page, encoding="utf-8", errors="replace")
    beside.replace(target)
    return target


def count(value: float) -> str:
    """1,234 below ten thousand, then 12.3 k, 4.56 M, 7.89 B."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scaled = value / (1e3 if suffix == "k" else size)
            return f"{scaled:.4g} {suffix}" if scaled >= 100 else f"{scaled:.3g} {suffix}"
    return f"{value:,.0f}"


def number(value: float | None) -> str:
    """Four decimals for measurements of order one, fewer for large ones; a dash where there is none."""
    if value is None:
        return DASH
    return f"{value:,.4f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def visible(text: str) -> str:
    """Control characters, which a page may not carry or may be reordered by, as the replacement character."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text)
