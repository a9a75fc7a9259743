"""Architectures as drawings: a column of layers, its widths to one scale, so that two models can be compared at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from launch.sweep_text import experts
from modeling.config import ModelConfig

_WIDTH, _PITCH = 140.0, 11.0
_ATTENTION, _FFN = 5.5, 3.0  # heights of a layer's two bars
_BRACKET = 22.0
_GAP = 0.8  # between experts
_CLASSES = {"full": "full", "window": "window", "skip": "skip"}

HATCH = ('<svg class="defs" width="0" height="0" aria-hidden="true"><defs><pattern id="window-hatch" width="4" height="4" '
         'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="hatch-back" width="4" height="4"/>'
         '<rect class="hatch-line" width="1.7" height="4"/></pattern></defs></svg>')  # fmt: skip
"""What the fill of a window layer refers to; once a page."""


def widest(models: Sequence[ModelConfig]) -> int:
    """The scale of a set of drawings: its widest bar."""
    widths = [(model.hidden_size, model.ffn_size, model.moe.active_size if model.moe else 0) for model in models]
    return max((max(sizes) for sizes in widths), default=1)


def drawing(model: ModelConfig, scale: int, label: str) -> str:
    """An `<svg>` of the executed layers, the first on top. A layer is its attention (as wide as the model) over its FFN; of a
    mixture the shared expert and, apart from each other, as many as a token uses.

    scale: the size that fills the width. label: read aloud, and shown where the pointer rests. Layers that share their
    weights have one bracket.
    """
    kinds = [kind for kind in model.attention_kinds for _ in range(model.block_repeat)]
    shapes: dict[str, list[str]] = {"ffn": [], "expert": [], **{kind: [] for kind in _CLASSES.values()}}
    for place, kind in enumerate(kinds):
        top = _PITCH * place
        shapes[_CLASSES[kind]].append(_bar(model.hidden_size / scale, top, _ATTENTION))
        top += _ATTENTION + 0.5
        moe = model.moe_at(place // model.block_repeat)
        if moe is None:
            shapes["ffn"].append(_bar(model.ffn_size / scale, top, _FFN))
            continue
        parts = [moe.shared_size] * (moe.shared_size > 0) + [moe.expert_size] * moe.top_k
        for part, (left, width) in enumerate(_tiles([part / scale for part in parts])):
            name = "ffn" if part < len(parts) - moe.top_k else "expert"
            shapes[name].append(f"M{left:.1f} {top:g}h{width:.1f}v{_FFN:g}h-{width:.1f}z")
    bars = "".join(f'<path class="{name}" d="{"".join(parts)}"/>' for name, parts in shapes.items() if parts)
    brackets = _brackets(model) if model.block_repeat > 1 else ""
    width = _WIDTH + (_BRACKET if brackets else 0)
    height = _PITCH * len(kinds)
    text = escape(f"{label}. {spoken(model)}")
    return (f'<svg class="arch" viewBox="0 0 {width:g} {height:g}" style="width:{width:g}px" role="img" '
            f'aria-label="{text}"><title>{text}</title>{bars}{brackets}</svg>')  # fmt: skip


def spoken(model: ModelConfig) -> str:
    """Layers from the first to the last, runs of one kind together."""
    runs = [(kind, len(list(same))) for kind, same in groupby(model.attention_kinds)]
    names = {"full": "full attention", "window": f"a window of {model.window}", "skip": "no attention"}
    layers = ", ".join(f"{number} with {names[kind]}" for kind, number in runs)
    shared = f"; each stored layer runs {model.block_repeat} times" if model.block_repeat > 1 else ""
    return f"{model.num_layers} layers, width {model.hidden_size}, FFN {model.ffn_size}{experts(model)}: {layers}{shared}"


def _bar(share: float, top: float, height: float) -> str:
    width = max(share * _WIDTH, 1.0)
    return f"M{(_WIDTH - width) / 2:.1f} {top:g}h{width:.1f}v{height:g}h-{width:.1f}z"


def _tiles(shares: Sequence[float]) -> list[tuple[float, float]]:
    """(left, width) of parts that lie side by side, centred, with a gap that they lose."""
    left = (1 - sum(shares)) * _WIDTH / 2
    found = []
    for share in shares:
        found.append((left, max(share * _WIDTH - _GAP, 0.5)))
        left += share * _WIDTH
    return found


def _brackets(model: ModelConfig) -> str:
    """To the right of the layers that one stored block becomes."""
    length = _PITCH * model.block_repeat
    lines = "".join(f"M{_WIDTH + 3:g} {length * block + 0.5:g}h4v{length - 3:g}h-4" for block in range(model.num_layers))
    times = f"\N{MULTIPLICATION SIGN}{model.block_repeat}"
    names = "".join(f'<text x="{_WIDTH + 10:g}" y="{length * (block + 0.5) + 1.5:g}">{times}</text>'
                    for block in range(model.num_layers))  # fmt: skip
    return f'<path class="bracket" d="{lines}"/>{names}'
