"""How many candidates pass the hard filters, and drawing them: numbers are listed, patterns counted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

from modeling.config import AttentionKind, ModelConfig
from search.candidate import NUMBERS, Candidate, Limits
from search.experts import IDLE
from search.patterns import PatternCounts


class Counting:
    """Of one space: its lists, kinds, limits and what makes a model of a candidate."""

    def __init__(
        self, choices: Mapping[str, tuple[int, ...]], attention: tuple[AttentionKind, ...], limits: Limits,
        to_config: Callable[[Candidate], ModelConfig],
    ) -> None:
        self.choices, self.attention, self.limits, self._to_config = choices, attention, limits, to_config

    def size(self) -> int:
        """Feasible candidates, exactly."""
        return sum(count for _, count in self.feasible_numbers)

    def sample(self, draw: random.Random) -> Candidate:
        """Sizes uniform over the feasible ones, then the pattern uniform over theirs. The number of experts comes first: else
        hardly a model were dense, since mixtures have two dimensions more."""
        groups = self._by_experts
        numbers, _ = draw.choice(groups[0] if len(groups) == 1 else draw.choice(groups))
        patterns = self._patterns(numbers)
        allowed = self._allowed_counts(numbers)
        wanted = draw.choices([pair for pair, _ in allowed], [ways for _, ways in allowed])[0]
        return replace(numbers, attention=patterns.sample(draw, numbers.num_layers, *wanted))

    def _patterns(self, numbers: Candidate) -> PatternCounts:
        return PatternCounts.of(self.attention, self.limits.max_without_full // numbers.block_repeat)

    def _allowed_counts(self, numbers: Candidate) -> list[tuple[tuple[int, int], int]]:
        """((full layers, window layers), patterns with so many) for every pair that fits in memory."""
        counts = self._patterns(numbers).by_counts(numbers.num_layers)
        if self.limits.memory_bytes is None:
            return list(counts.items())
        return [(pair, ways) for pair, ways in counts.items() if self._memory(numbers, *pair) <= self.limits.memory_bytes]

    def _memory(self, numbers: Candidate, full: int, window: int) -> int:
        """Depends on how many layers are of a kind, not on which."""
        counts: tuple[tuple[AttentionKind, int], ...] = (
            ("full", full), ("window", window), ("skip", numbers.num_layers - full - window))
        kinds = tuple(kind for kind, count in counts for _ in range(count))
        return self.limits.memory(self._to_config(replace(numbers, attention=kinds)))

    @cached_property
    def feasible_numbers(self) -> list[tuple[Candidate, int]]:
        """Every choice of numbers (its pattern empty) that has a feasible pattern, with how many it has."""
        found = []
        for values in itertools.product(*(self.choices[name] for name in NUMBERS)):
            numbers = Candidate(**dict(zip(NUMBERS, values, strict=True)), attention=())
            if numbers.experts == 1 and any(getattr(numbers, name) != self.choices[name][0] for name in IDLE):
                continue  # the same dense model as with the first values
            if self.limits.number_violations(numbers):
                continue
            if ways := self._count_patterns(numbers):
                found.append((numbers, ways))
        return found

    @cached_property
    def _by_experts(self) -> list[list[tuple[Candidate, int]]]:
        groups: dict[int, list[tuple[Candidate, int]]] = {}
        for item in self.feasible_numbers:
            groups.setdefault(item[0].experts, []).append(item)
        return list(groups.values())

    def _count_patterns(self, numbers: Candidate) -> int:
        counts = self._patterns(numbers).by_counts(numbers.num_layers)
        cap = self.limits.memory_bytes
        # Most choices fit with their largest pattern, or not even with their smallest; only the rest is gone through.
        if not counts or cap is None or self._memory(numbers, *max(counts, key=lambda pair: (sum(pair), pair[0]))) <= cap:
            return sum(counts.values())
        return sum(ways for _, ways in self._allowed_counts(numbers))

    def why_empty(self) -> str:
        """What keeps every candidate out, in words."""
        first = replace(Candidate(**{name: self.choices[name][0] for name in NUMBERS}, attention=()))
        if wrong := self.limits.number_violations(first):
            return f"already the first choices fail ({wrong[0]}), and so do all others; widen a list"
        if "full" not in self.attention:
            return "every candidate needs a layer with full attention; add \"full\" to attention"
        counts = self._patterns(first).by_counts(first.num_layers)
        if not counts:
            return "no pattern of layers passes max_without_full; raise it or add \"full\""
        smallest = min(self._memory(first, *pair) for pair in counts)
        return f"the smallest candidate needs {smallest} bytes, the cap is {self.limits.memory_bytes}; raise memory_bytes"
