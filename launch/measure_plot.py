"""A picture of where a token's time goes."""

from __future__ import annotations

from pathlib import Path

from launch.rundir import beside, writing
from search.devices.base import Measurement


def plot_operations(found: Measurement, path: Path) -> None:
    """Two bars of milliseconds by operation: the whole prompt, and one decoded token. Written as the suffix of `path` says."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"prefill_ms": f"prefill of {found['prompt_tokens']} tokens", "decode_ms": "one decoded token"}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        parts = {name: value for name, value in found["operations"][key].items() if value > 0}
        total = sum(parts.values())
        bars = axis.barh(list(parts), list(parts.values()), color="#3b6ea5")
        axis.bar_label(bars, [f"{value / total:.0%}" for value in parts.values()], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{title}: {total:.3g} ms", fontsize=10)
        axis.set_xlabel("ms")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    figure.suptitle(f"{found['device']} ({found['fidelity']}), {found['isa']}, {found['threads']} thread(s)", fontsize=10)
    with writing(path), beside(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix.removeprefix("."))
    pyplot.close(figure)
