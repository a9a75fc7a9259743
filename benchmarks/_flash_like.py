"""Synthetic search problems of MobileLLM-Flash's kind with an exactly known front: sizes, a pattern over layers, loss and TTFT.

The functions are made up; only their form is taken from the paper: a power law of size, a best shape, a price for each layer
without full attention that differs by layer, a growing price of runs without it; a roofline for time. Three variants differ in
names, exponents, prices and device, so that nothing is tuned to one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.hypervolume import hypervolume

Array = NDArray[np.float64]
CONTEXT, HEAD, VOCABULARY = 2048, 64, 128256
SIZES = (tuple(range(10, 17)), tuple(range(1024, 2049, 128)), tuple(range(2048, 8193, 512)), tuple(range(8, 33, 4)), (2, 4, 8))
SLOTS = max(SIZES[0])
REFERENCE = {"ttft": 4.0, "loss": 0.6}
LOSS_NOISE, TIME_NOISE, OUTLIERS = 0.008, 0.02, 0.03
KINDS = ("full", "window", "skip")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One variant. Loss = floor + scale N^-exponent + shape + pattern; N in billions."""

    name: str
    names: tuple[str, str, str, str, str, str] = ("layers", "d_model", "d_ffn", "heads", "kv_heads", "slot_{}")
    sizes: tuple[tuple[int, ...], ...] = SIZES
    """What layers, width, FFN width, heads and KV heads may be; as many slots as layers at most."""
    kinds: tuple[Any, ...] = KINDS
    """What a slot may hold for full, window and skip."""
    floor: float = 0.10
    scale: float = 0.14
    exponent: float = 0.6
    shape: tuple[float, float, float, float] = (0.04, 0.03, 0.03, 0.010)
    """Weights of FFN ratio, width for depth, heads for width, and few KV heads."""
    bend: float = 2.0
    """Power of what a shape is off by, in logs."""
    embedding: float = 0.0
    """Share of the embedding's parameters that counts as size."""
    best_ratio: float = 3.2
    width_a_layer: float = 110.0
    skip_price: float = 0.012
    window_share: float = 0.45
    run_price: float = 0.010
    run_power: float = 1.7
    tflops: float = 0.42
    attention_tflops: float = 0.20
    bandwidth: float = 20e9
    layer_ms: float = 2.0
    odd_width_cost: float = 0.06
    seed: int = 0

    # --- the space ---

    @property
    def space(self) -> dict[str, list[Any]]:
        sizes: dict[str, list[Any]] = dict(zip(self.names[:5], map(list, self.sizes), strict=True))
        return {**sizes, **{self.names[5].format(i): list(self.kinds) for i in range(self.slots)}}

    @property
    def slots(self) -> int:
        return max(self.sizes[0])

    def repair(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Slots of layers that are not there hold the first kind."""
        layers = config[self.names[0]]
        return {**config, **{self.names[5].format(i): self.kinds[0] for i in range(layers, self.slots)}}

    def numbers(self, config: Mapping[str, Any]) -> tuple[int, int, int, int, int, list[int]]:
        sizes = [config[name] for name in self.names[:5]]
        kinds = [self.kinds.index(config[self.names[5].format(i)]) for i in range(sizes[0])]
        return (*sizes, kinds)  # type: ignore[return-value]

    # --- the functions ---

    @cached_property
    def prices(self) -> Array:
        """[slots, kinds]: what each kind costs in each layer of the deepest model; both ends are dear."""
        draw = np.random.default_rng([self.seed, 77])
        depth = np.linspace(-1, 1, self.slots)
        skip = self.skip_price * (0.35 + 1.4 * depth**4 + 0.9 * draw.random(self.slots))
        window = skip * self.window_share * (0.6 + 0.8 * draw.random(self.slots))
        return np.stack([np.zeros(self.slots), window, skip], axis=1)

    def size_loss(self, layers: Any, width: Any, ffn: Any, heads: Any, kv: Any, full: Any, window: Any) -> Any:
        attention = 2 * width * HEAD * (heads + kv) * (full + window)
        billions = (3.0 * layers * width * ffn + attention + self.embedding * VOCABULARY * width) / 1e9
        ratio, depth, match, few = self.shape

        def off(quotient: Any) -> Any:
            return np.abs(np.log(quotient)) ** self.bend

        return (
            self.floor + self.scale * billions**-self.exponent
            + ratio * off(ffn / width / self.best_ratio) + depth * off(width / (self.width_a_layer * layers))
            + match * off(heads * HEAD / width) + few * np.log2(max(self.sizes[4]) / kv)
        )  # fmt: skip

    def time(self, layers: Any, width: Any, ffn: Any, heads: Any, kv: Any, full: Any, window: Any) -> Any:
        """Seconds to the first token of a prompt of CONTEXT tokens; depends on how many layers are of a kind."""
        slower = 1 + self.odd_width_cost * ((np.asarray(width) % 256 != 0) + (np.asarray(ffn) % 1024 != 0))
        speed = self.tflops * 1e12

        def product(rows: Any, columns: Any) -> Any:
            return np.maximum(2.0 * rows * columns * CONTEXT * slower / speed, rows * columns * 0.56 / self.bandwidth)

        def scores(seen: float) -> Any:
            return 4.0 * heads * HEAD * seen / (self.attention_tflops * 1e12)

        causal, banded = CONTEXT * (CONTEXT + 1) / 2, 256 * CONTEXT - 256 * 255 / 2
        projections = product(width, HEAD * (2 * heads + 2 * kv))
        per_layer = product(3 * width, ffn) + 1e-3 * self.layer_ms
        head = VOCABULARY * width * 0.56 / self.bandwidth
        return (layers * per_layer + (full + window) * (projections + 1e-3 * self.layer_ms)
                + full * scores(causal) + window * scores(banded) + head)  # fmt: skip

    def pattern_loss(self, kinds: list[int]) -> float:
        """Of the kinds of the layers that are there; a run without full attention costs with every layer it grows."""
        total, run = 0.0, 0
        for slot, kind in enumerate(kinds):
            run = run + 1 if kind else 0
            total += self.prices[slot, kind] + self.growth(run)
        return total

    def growth(self, run: int) -> float:
        """What the `run`-th layer in a row without full attention adds."""
        return self.run_price * ((run - 1) ** self.run_power - max(run - 2, 0) ** self.run_power) if run > 1 else 0.0

    def evaluate(self, config: Mapping[str, Any]) -> tuple[float, float]:
        """(ttft, loss) without noise."""
        layers, width, ffn, heads, kv, kinds = self.numbers(config)
        full, window = kinds.count(0), kinds.count(1)
        loss = self.size_loss(layers, width, ffn, heads, kv, full, window) + self.pattern_loss(kinds)
        return float(self.time(layers, width, ffn, heads, kv, full, window)), float(loss)

    # --- the front ---

    @cached_property
    def true_front(self) -> Array:
        """[points, 2] of (ttft, loss), exact: best pattern for each count of kinds by dynamic programming, all sizes listed."""
        width, ffn, heads, kv = (np.array(column, dtype=np.float64) for column in
                                 zip(*itertools.product(*list(self.space.values())[1:5]), strict=True))  # fmt: skip
        found = np.empty((0, 2))
        for layers in self.space[self.names[0]]:
            for (full, window), price in self._best_patterns(layers).items():
                times = self.time(layers, width, ffn, heads, kv, full, window)
                losses = self.size_loss(layers, width, ffn, heads, kv, full, window) + price
                points = np.stack([times, losses], axis=1)
                points = points[(points < list(REFERENCE.values())).all(axis=1)]
                found = np.vstack([found, points[_quick_front(points)]])
        return found[_quick_front(found)]

    def _best_patterns(self, layers: int) -> dict[tuple[int, int], float]:
        """(full, window) -> the least that a pattern with so many costs."""
        states = {(0, 0, 0): 0.0}  # (run, full, window) -> cost
        for slot in range(layers):
            following: dict[tuple[int, int, int], float] = {}
            for (run, full, window), cost in states.items():
                for kind in range(3):
                    after = (0 if kind == 0 else run + 1, full + (kind == 0), window + (kind == 1))
                    price = cost + float(self.prices[slot, kind]) + self.growth(after[0])
                    if price < following.get(after, np.inf):
                        following[after] = price
            states = following
        best: dict[tuple[int, int], float] = {}
        for (_, full, window), cost in states.items():
            best[full, window] = min(cost, best.get((full, window), np.inf))
        return best

    @cached_property
    def full_volume(self) -> float:
        return hypervolume(self.true_front, np.array(list(REFERENCE.values())))

    def share(self, values: list[tuple[float, float]]) -> float:
        """Hypervolume of noise-free (ttft, loss) pairs as a share of the true front's."""
        return hypervolume(np.array(values).reshape(-1, 2), np.array(list(REFERENCE.values()))) / self.full_volume


def _quick_front(points: Array) -> NDArray[np.intp]:
    order = np.lexsort((points[:, 1], points[:, 0]))
    losses = points[order, 1]
    before = np.concatenate([[np.inf], np.minimum.accumulate(losses)[:-1]])
    return order[losses < before]


VARIANTS = {
    "flash": Problem(name="flash"),
    "renamed": Problem(
        name="renamed", names=("a", "b", "c", "d", "e", "z[{}]"), floor=0.02, scale=0.24, exponent=0.36, best_ratio=4.2,
        shape=(0.06, 0.015, 0.05, 0.02), skip_price=0.006, run_price=0.018, run_power=1.3, tflops=0.35,
        odd_width_cost=0.0, seed=1,
    ),
    "steep": Problem(
        name="steep", names=("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "attention.{}"),
        floor=0.20, scale=0.07, exponent=0.9, best_ratio=2.6, shape=(0.02, 0.06, 0.01, 0.006), skip_price=0.02,
        window_share=0.25, run_price=0.004, run_power=2.2, tflops=0.6, attention_tflops=0.1, odd_width_cost=0.12, seed=2,
    ),
}  # fmt: skip
