"""Patterns of attention kinds over layers: how many pass the filters, and drawing one uniformly, by dynamic programming."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

from modeling.config import AttentionKind


@dataclass(frozen=True)
class PatternCounts:
    """Patterns with at least one full layer and at most `longest_run` layers in a row without."""

    kinds: tuple[AttentionKind, ...]
    longest_run: int

    @classmethod
    def of(cls, kinds: tuple[AttentionKind, ...], longest_run: int) -> PatternCounts:
        """One object for equal arguments, so that what it counted is kept."""
        return _patterns(kinds, longest_run)

    def by_counts(self, layers: int) -> dict[tuple[int, int], int]:
        """(full layers, window layers) -> how many patterns of `layers` layers have so many."""
        return _by_counts(self, layers)

    def sample(self, draw: random.Random, layers: int, full: int, window: int) -> tuple[AttentionKind, ...]:
        """One of the patterns with these counts, each equally likely. Raises ValueError where there is none."""
        picked: list[AttentionKind] = []
        run = 0
        while len(picked) < layers:
            left = layers - len(picked)
            weights = [_completions(self, left - 1, *after) if (after := self._after(kind, run, full, window)) else 0
                       for kind in self.kinds]  # fmt: skip
            if not any(weights):
                raise ValueError(f"no pattern of {layers} layers has {full} full and {window} window layers")
            kind = draw.choices(self.kinds, weights)[0]
            after = self._after(kind, run, full, window)
            assert after is not None  # its weight was not 0
            run, full, window = after
            picked.append(kind)
        return tuple(picked)

    def _after(self, kind: AttentionKind, run: int, full: int, window: int) -> tuple[int, int, int] | None:
        """(run, full still to come, window still to come) once `kind` was placed; None where it may not be."""
        if kind == "full":
            return (0, full - 1, window) if full else None
        if run == self.longest_run:
            return None
        if kind == "window":
            return (run + 1, full, window - 1) if window else None
        return run + 1, full, window


@cache
def _patterns(kinds: tuple[AttentionKind, ...], longest_run: int) -> PatternCounts:
    return PatternCounts(kinds, longest_run)


@cache
def _completions(patterns: PatternCounts, left: int, run: int, full: int, window: int) -> int:
    """How many ways there are to fill `left` more layers, `run` layers after the last full one."""
    if full + window > left:
        return 0
    if left == 0:
        return 1
    steps = (patterns._after(kind, run, full, window) for kind in patterns.kinds)
    return sum(_completions(patterns, left - 1, *after) for after in steps if after)


@cache
def _by_counts(patterns: PatternCounts, layers: int) -> dict[tuple[int, int], int]:
    states: Counter[tuple[int, int, int]] = Counter({(0, 0, 0): 1})  # (run, full, window) -> ways
    for _ in range(layers):
        following: Counter[tuple[int, int, int]] = Counter()
        for (run, full, window), ways in states.items():
            for kind in patterns.kinds:
                if kind == "full":
                    following[0, full + 1, window] += ways
                elif run < patterns.longest_run:
                    following[run + 1, full, window + (kind == "window")] += ways
        states = following
    found: Counter[tuple[int, int]] = Counter()
    for (_, full, window), ways in states.items():
        if full:
            found[full, window] += ways
    return dict(found)
