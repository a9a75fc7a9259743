"""A domain as numbers: which names are sizes, which are slots of layers, which slots count, and what can be derived.

Nothing is known of the names but what they hold (`search.optim.names`): slots of one group, sizes where the values are numbers,
categories. Where the roles of the sizes are known (layers, hidden, ffn, heads, kv) the size of the model is derived as well.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.base import Domain, Flat
from search.optim.names import LARGEST_RATIO, find_idle, find_roles, is_number, slot_groups

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
FULL = re.compile(r"full|global|dense", re.IGNORECASE)
MOST_PRODUCTS = 600
ABSENT = re.compile(r"skip|none|null|identity|off|no_?att", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """Columns of some candidates. [candidates, columns] each."""

    dense: Array
    """Few smooth coordinates: for a kernel with a length scale each."""
    main: Array
    """The columns most likely to matter: for a linear kernel with a variance each."""
    groups: dict[str, Array]
    """Many columns whose effects add up: for linear kernels, one variance a group."""
    levels: Array
    """One column for each value of each size."""
    work: Array
    """Products of sizes and counts, >= 0: what a time is a sum of."""


class Encoder:
    """Codes (the index of each name's value) and tables of features."""

    def __init__(self, domain: Domain, seed: int = 0) -> None:
        self.domain = domain
        self.names = list(domain.choices)
        self.sizes = np.array([len(domain.choices[name]) for name in self.names])
        self._index = [{_hashable(value): i for i, value in enumerate(domain.choices[name])} for name in self.names]
        self.slot_groups = slot_groups(domain)
        slots = {i for group in self.slot_groups for i in group}
        self.numeric = [i for i, name in enumerate(self.names)
                        if i not in slots and all(is_number(value) for value in domain.choices[name])]  # fmt: skip
        self._positive = np.array([min(domain.choices[self.names[i]]) > 0 for i in self.numeric], dtype=bool)
        self.categories = [i for i in range(len(self.names)) if i not in slots and i not in self.numeric]
        draw = np.random.default_rng(seed)
        self._active = [find_idle(domain, self.decode, group, self.numeric, draw) for group in self.slot_groups]
        self.repair_is_masking = self._check_masking(draw)
        self._roles = find_roles(domain, self.numeric, next((found[0] for found in self._active if found is not None), None))

    # --- codes ---

    def encode(self, flats: Sequence[Flat]) -> Codes:
        """[candidates, names]; idle slots 0."""
        codes = np.array([[index.get(_hashable(flat[name]), 0) for name, index in zip(self.names, self._index, strict=True)]
                          for flat in flats], dtype=np.int64).reshape(len(flats), len(self.names))  # fmt: skip
        return self.mask(codes)

    def decode(self, code: NDArray[np.int64]) -> Flat:
        """Canonical."""
        return self.domain.canonical({name: self.domain.choices[name][i] for name, i in zip(self.names, code, strict=True)})

    def mask(self, codes: Codes) -> Codes:
        """Idle slots cleared."""
        masked = codes.copy()
        for group in range(len(self.slot_groups)):
            columns = self.slot_groups[group]
            masked[:, columns] *= self.active(codes, group)
        return masked

    def active(self, codes: Codes, group: int) -> NDArray[np.bool_]:
        """[candidates, slots of the group]"""
        found = self._active[group]
        if found is None:
            return np.ones((len(codes), len(self.slot_groups[group])), dtype=bool)
        column, table = found
        return table[codes[:, column]]

    def _check_masking(self, draw: np.random.Generator) -> bool:
        """Whether repair does nothing but clear idle slots: then candidates can be compared by their codes alone."""
        if self.domain.repair is None:
            return True
        codes = draw.integers(self.sizes, size=(100, len(self.names)))
        return bool((self.encode([self.decode(code) for code in codes]) == self.mask(codes)).all())

    @property
    def knows_size(self) -> bool:
        """Whether names and values say enough to tell how large a model is."""
        return bool(self._roles)

    # --- features ---

    def table(self, codes: Codes) -> Table:
        """All features of masked codes."""
        numbers = self._numbers(codes)
        # By a size's values, not by these candidates': the same column means the same in every table.
        logs = np.where(self._positive, np.log(np.where(self._positive, numbers, 1.0)), numbers)
        counts, runs, slots = self._slot_features(codes)
        kinds = _columns([np.eye(self.sizes[i])[codes[:, i]] for i in self.categories], len(codes))
        levels = _columns([np.eye(self.sizes[i])[codes[:, i]] for i in self.numeric], len(codes))
        smooth = np.hstack([logs, self._model_size(codes, numbers, counts), counts])
        # Longest run and sum of lengths of each kind come first; the rest of the runs is for the linear part only.
        dense = np.hstack([smooth, runs[:, : runs.shape[1] // 3], kinds])
        groups = {name: columns for name, columns in {"slots": slots, "kinds": kinds}.items() if columns.shape[1]}
        return Table(dense, np.hstack([smooth, runs]), groups, levels, self._work(numbers, counts))

    def _numbers(self, codes: Codes) -> Array:
        columns = [np.array(self.domain.choices[self.names[i]], dtype=np.float64)[codes[:, i]] for i in self.numeric]
        return np.stack(columns, axis=1) if columns else np.empty((len(codes), 0))

    def _slot_features(self, codes: Codes) -> tuple[Array, Array, Array]:
        """How many slots are of a kind, runs without the full kind, one column for each slot and kind."""
        counts: list[Array] = []
        runs: list[Array] = []
        slots: list[Array] = []
        for group, columns in enumerate(self.slot_groups):
            active = self.active(codes, group)
            values = self.domain.choices[self.names[columns[0]]]
            # Where no name says which kind is the full one, runs without any of them may matter.
            full = [i for i, value in enumerate(values) if FULL.search(str(value))] or range(len(values))
            for kind in range(len(values)):
                has = active & (codes[:, columns] == kind)
                counts.append(has.sum(axis=1, keepdims=True).astype(np.float64))
                slots.append(has.astype(np.float64))
                if kind in full:
                    runs.append(_run_features(active & ~has, has))
        rows = len(codes)
        return _columns(counts, rows), _by_feature(_columns(runs, rows)), _columns(slots, rows)

    def _model_size(self, codes: Codes, numbers: Array, counts: Array) -> Array:
        """[candidates, 3]: log parameters, and log of the shares of attention and width; empty where roles are unknown."""
        if not self._roles:
            return np.empty((len(codes), 0))
        of = {role: numbers[:, self.numeric.index(column)] for role, column in self._roles.items()}
        attended = of["layers"]
        if self.slot_groups:
            kinds = self.domain.choices[self.names[self.slot_groups[0][0]]]
            there = [i for i, kind in enumerate(kinds) if not ABSENT.search(str(kind))]
            attended = counts[:, there].sum(axis=1) * of.get("repeat", 1.0)
        head = of.get("head_dim", np.full(len(codes), 64.0))
        width = of["ffn"] * (of["hidden"] if of["ffn"].max(initial=0) <= LARGEST_RATIO else 1.0)
        ffn = 3 * of["layers"] * of["hidden"] * width
        attention = 2 * attended * of["hidden"] * head * (of["heads"] + of["kv"])
        total = np.log(ffn + attention)
        return np.stack([total, np.log1p(attention / ffn), np.log(of["hidden"] / of["layers"])], axis=1)

    def _work(self, numbers: Array, counts: Array) -> Array:
        """Every product of at most three sizes and counts, each scaled to 1 at the largest; of fewer where those are many."""
        tops = [float(max(self.domain.choices[self.names[i]])) or 1.0 for i in self.numeric]
        sizes = np.abs(numbers) / np.array(tops) if tops else numbers
        slots = np.array([len(group) for group in self.slot_groups for _ in range(self.sizes[group[0]])], dtype=np.float64)
        base = np.hstack([np.ones((len(numbers), 1)), sizes, counts / slots if len(slots) else counts])
        degree = next((degree for degree in (3, 2) if math.comb(base.shape[1] + degree - 1, degree) <= MOST_PRODUCTS), 1)
        products = np.array(list(itertools.combinations_with_replacement(range(base.shape[1]), degree)))
        return base[:, products].prod(axis=2)


def _run_features(lacking: NDArray[np.bool_], has: NDArray[np.bool_]) -> Array:
    """[candidates, 6] of runs of active slots that lack a kind: the longest, sums over runs of (length - 1), of its square, of
    (length - 2) squared, how many are 2 (3) or longer. A lone slot counts nowhere: its price is that of its kind.

    Counted as in a walk over the slots: each slot knows how long the run is that it continues.
    """
    rows = len(lacking)
    length, longest = np.zeros(rows), np.zeros(rows)
    sums = np.zeros((5, rows))
    for at in range(lacking.shape[1]):
        length = np.where(lacking[:, at], length + 1, np.where(has[:, at], 0, length))
        grown = lacking[:, at]
        longest = np.maximum(longest, length)
        excess, more = np.maximum(length - 1, 0), np.maximum(length - 2, 0)
        squares = [np.maximum(2 * over - 1, 0) for over in (excess, more)]
        sums += grown * np.stack([excess > 0, *squares, length == 2, length == 3])
    return np.stack([np.maximum(longest - 1, 0), *sums], axis=1)


def _by_feature(runs: Array) -> Array:
    """The first two features of every kind first."""
    if not runs.shape[1]:
        return runs
    order = [start + i for part in ((0, 1), (2, 3, 4, 5)) for start in range(0, runs.shape[1], 6) for i in part]
    return runs[:, order]


def _columns(parts: Sequence[Array], rows: int) -> Array:
    return np.hstack(parts) if parts else np.empty((rows, 0))


def _hashable(value: Any) -> Any:
    return value if value.__hash__ is not None else str(value)
