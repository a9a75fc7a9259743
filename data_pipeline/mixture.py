"""Which row of which source is sequence number k, from k alone.

There is no state to lose: the order is a function of (seed, weights, sizes, k), the same for every number of workers.
In every block of 65,536 sequences a source has exactly its share, spread evenly; each pass over a source is a new
pseudo-random permutation of its rows (a Feistel network, so no index arrays).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import DataError

BLOCK = 65_536
_ROUNDS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014), on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(items: np.ndarray, size: int, *, seed: int, source: int, epoch: np.ndarray) -> np.ndarray:
    """Pseudo-random permutation of range(size), one for each (seed, source, epoch), at the given items.

    A balanced Feistel network over the next power of four; values outside are sent through again until inside.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    start = np.uint64((seed * _GOLDEN + source * 0xD1B54A32D192ED03) & _MASK64)
    key = _mix(start + epoch.astype(np.uint64) * np.uint64(0x8CB92BA72F3D8DD7))
    keys = [_mix(key + np.uint64((r + 1) * _GOLDEN & _MASK64)) for r in range(_ROUNDS)]
    result = items.astype(np.uint64)
    todo = np.arange(len(result))
    while len(todo):
        left, right = result[todo] >> half, result[todo] & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key[todo]) & low)
        result[todo] = (left << half) | right
        todo = todo[result[todo] >= size]
    return result.astype(np.int64)


def quantise(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers that add up to 65,536 in proportion to the weights (largest remainder), each at least 1."""
    if not weights or not all(math.isfinite(w) and w > 0.0 for w in weights):
        raise DataError(f"weights {list(weights)}: expected positive numbers; remove a source instead of giving it 0")
    exact = np.asarray(weights, float) / math.fsum(weights) * BLOCK
    counts = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(-(exact - np.floor(exact)), kind="stable")
    missing = BLOCK - int(counts.sum())
    counts[order[: max(missing, 0)]] += 1
    for _ in range(-missing):  # sources raised to 1 are paid for by the largest
        counts[np.argmax(counts)] -= 1
    return counts


class Mixture:
    """A weighted order over sources of `sizes` rows. `phases` is ((start k, weights), ...), the first starting at 0."""

    def __init__(self, sizes: Sequence[int], phases: Sequence[tuple[int, Sequence[float]]], seed: int) -> None:
        starts = [start for start, _ in phases]
        if not phases or starts[0] != 0 or starts != sorted(set(starts)):
            raise DataError(f"phases start at {starts}; expected 0 first and then growing numbers")
        if any(len(weights) != len(sizes) for _, weights in phases) or min(sizes, default=0) < 1:
            raise DataError(f"mixture of sizes {list(sizes)}: expected a weight and at least one row for each source")
        self.sizes = tuple(sizes)
        self.seed = seed
        self._starts = starts
        self._shares = [quantise(weights) for _, weights in phases]
        self._block = functools.lru_cache(maxsize=2)(self._build_block)
        # Ordinals carry on over a phase's end, so changed weights neither repeat nor skip rows.
        self._bases = [np.zeros(len(sizes), np.int64)]
        for phase in range(len(phases) - 1):
            self._bases.append(self._bases[-1] + self._counts_in_phase(phase, starts[phase + 1] - starts[phase]))

    def _build_block(self, phase: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number within the block among that source's) of each position of a block."""
        shares = self._shares[phase]
        key = np.array([self.seed & _MASK64, (phase << 48) ^ block], np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        numbers = np.concatenate([np.arange(share) for share in shares])
        keys = (numbers + generator.random(BLOCK)) / np.repeat(shares, shares)
        order = np.argsort(keys, kind="stable")
        return np.repeat(np.arange(len(shares)), shares)[order], numbers[order]

    def _counts_in_phase(self, phase: int, sequences: int) -> np.ndarray:
        blocks, rest = divmod(sequences, BLOCK)
        counts = self._shares[phase] * blocks
        if rest:
            counts = counts + np.bincount(self._block(phase, blocks)[0][:rest], minlength=len(self.sizes))
        return counts

    def counts(self, sequences: int) -> np.ndarray:
        """How many of the first `sequences` come from each source."""
        phase = int(np.searchsorted(self._starts, sequences, side="right")) - 1
        return self._bases[phase] + self._counts_in_phase(phase, sequences - self._starts[phase])

    def lookup(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, row) of sequences start to start + count, int64 each."""
        source, ordinal = np.empty(count, np.int64), np.empty(count, np.int64)
        at = start
        while at < start + count:
            phase = int(np.searchsorted(self._starts, at, side="right")) - 1
            block, inside = divmod(at - self._starts[phase], BLOCK)
            phase_end = self._starts[phase + 1] if phase + 1 < len(self._starts) else start + count
            stop = min(start + count, phase_end, at - inside + BLOCK)
            sources, numbers = self._block(phase, block)
            part = slice(inside, inside + stop - at)
            out = slice(at - start, stop - start)
            source[out] = sources[part]
            before = self._bases[phase] + block * self._shares[phase]
            ordinal[out] = before[sources[part]] + numbers[part]
            at = stop
        row = np.empty(count, np.int64)
        for number in np.unique(source):
            mine = source == number
            epoch, item = np.divmod(ordinal[mine], self.sizes[number])
            row[mine] = permute(item, self.sizes[number], seed=self.seed, source=int(number), epoch=epoch)
        return source, row
