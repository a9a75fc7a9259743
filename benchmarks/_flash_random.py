"""Problems of Flash's kind drawn at random: names, lists of values, exponents, prices and device all differ.

A method that was tuned on the three variants of `_flash_like` has not seen these. Only two things are set by looking at the
drawn problem: the device is as fast, and the loss as low, as it takes for the reference to cut a part off the space.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._flash_like import REFERENCE, Problem

NAMES = (
    ("layers", "d_model", "d_ffn", "heads", "kv_heads", "slot_{}"),
    ("depth", "width", "mlp", "n_heads", "n_kv", "attn{}"),
    ("n_layer", "dim", "hidden_dim", "n_head", "n_kv_head", "layer_{}_attention"),
    ("a", "b", "c", "d", "e", "z[{}]"),
    ("x0", "x1", "x2", "x3", "x4", "y{}"),
    ("L", "D", "F", "H", "K", "block{}.kind"),
)
KINDS = (("full", "window", "skip"), ("full", "window", "skip"), ("global", "local", "none"), (0, 1, 2))


def random_problem(seed: int) -> Problem:
    """Another problem for each seed, the same for the same seed."""
    draw = np.random.default_rng([seed, 4711])
    deepest, step = int(draw.integers(12, 21)), int(draw.choice([64, 128, 256]))
    widths = tuple(range(768, 2049, step))
    ffns = tuple(range(1536, 8193, int(draw.choice([256, 512, 1024]))))
    sizes = (tuple(range(deepest - int(draw.integers(4, 8)), deepest + 1)), widths, ffns,
             tuple(range(8, 33, int(draw.choice([2, 4, 8])))), (1, 2, 4, 8) if draw.random() < 0.5 else (2, 4, 8))  # fmt: skip
    drawn = Problem(
        name=f"random{seed}", names=NAMES[draw.integers(len(NAMES))], kinds=KINDS[draw.integers(len(KINDS))], sizes=sizes,
        exponent=_between(draw, 0.3, 1.0), shape=(_between(draw, 0.015, 0.08), _between(draw, 0.015, 0.06),
                                                  _between(draw, 0.01, 0.05), _between(draw, 0.004, 0.02)),
        bend=float(draw.choice([1.5, 2.0, 2.5])), embedding=float(draw.choice([0.0, 0.5])),
        best_ratio=_between(draw, 2.4, 4.5), width_a_layer=float(draw.uniform(80, 140)), skip_price=_between(draw, 0.006, 0.02),
        window_share=_between(draw, 0.2, 0.6), run_price=_between(draw, 0.004, 0.018), run_power=float(draw.uniform(1.3, 2.2)),
        layer_ms=_between(draw, 0.5, 5.0), odd_width_cost=float(draw.choice([0.0, 0.06, 0.12])), seed=seed, scale=0.1,
    )  # fmt: skip
    return _fitted(drawn, draw)


def _between(draw: np.random.Generator, low: float, high: float) -> float:
    """Uniform in the log."""
    return float(np.exp(draw.uniform(np.log(low), np.log(high))))


def _fitted(problem: Problem, draw: np.random.Generator) -> Problem:
    """The device's speed, the floor and the scale of the loss so that the reference is worth the name."""
    flats = [{name: values[draw.integers(len(values))] for name, values in problem.space.items()} for _ in range(1500)]
    share = draw.uniform(0.25, 0.75)
    attention = draw.uniform(0.25, 0.6)
    slowest, fastest = 10.0, 0.02
    for _ in range(25):  # bisection: `share` of all candidates are within the limit
        speed = float(np.sqrt(slowest * fastest))
        problem = replace(problem, tflops=speed, attention_tflops=speed * attention)
        within = _values(problem, flats)[:, 0] < REFERENCE["ttft"]
        slowest, fastest = (speed, fastest) if within.mean() > share else (slowest, speed)
    size, shape = (_values(replace(problem, scale=scale, floor=0.0), flats)[:, 1] for scale in (0.1, 0.0))
    # The middle of the candidates lies near the reference and size moves them by as much as in the three variants.
    scale = 0.1 * draw.uniform(0.07, 0.12) / float(np.std(size - shape))
    problem = replace(problem, scale=scale, floor=0.0)
    middle = float(np.quantile(_values(problem, flats)[within, 1], draw.uniform(0.2, 0.5)))
    return replace(problem, floor=REFERENCE["loss"] - middle)


def _values(problem: Problem, flats: list[dict[str, Any]]) -> NDArray[np.float64]:
    return np.array([problem.evaluate(flat) for flat in flats])
