"""A domain as numbers: which names are sizes, which are slots of layers, which slots count, and what can be derived.

Nothing is known of the names but what they hold. Names that end in an index and share their values are the slots of one
group; other names with numbers are sizes; the rest are categories. Which slots a size leaves idle is found by asking `repair`.
Where the names tell their role (layers, hidden, ffn, heads, kv) the size of the model is derived as well.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.base import Domain, Flat

Array = NDArray[np.float64]
Codes = NDArray[np.int64]
INDEXED = re.compile(r"^(.*?)[\s_.\-\[(]*(\d+)[\])]*$")
ROLES = {"kv": r"kv", "ffn": r"ffn|ff|mlp|inter", "repeat": r"repeat", "layers": r"layer|depth|block|^n?_?l$",
         "head_dim": r"head_?(dim|size)", "heads": r"head", "hidden": r"hidden|model|width|embed|dim|^d$"}  # fmt: skip
"""What a name must look like to play a role, in the order in which they are tried."""
FULL = re.compile(r"full|global|dense", re.IGNORECASE)
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
        self.slot_groups = _slot_groups(domain)
        slots = {i for group in self.slot_groups for i in group}
        self.numeric = [i for i, name in enumerate(self.names)
                        if i not in slots and all(_is_number(value) for value in domain.choices[name])]  # fmt: skip
        self.categories = [i for i in range(len(self.names)) if i not in slots and i not in self.numeric]
        draw = np.random.default_rng(seed)
        self._active = [self._find_idle(group, draw) for group in self.slot_groups]
        self.repair_is_masking = self._check_masking(draw)
        self._roles = self._find_roles()

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

    # --- finding out ---

    def _find_idle(self, group: list[int], draw: np.random.Generator) -> tuple[int, NDArray[np.bool_]] | None:
        """(column of the size that decides, [its values, slots] active); None where all slots always count."""
        if self.domain.repair is None:
            return self._guess_idle(group)
        for column in self.numeric:
            tables = [self._probe(group, column, draw) for _ in range(3)]
            if not tables[0].all() and all((table == tables[0]).all() for table in tables):
                # Another size may decide and just have been equal in the probes: only one that varies is taken.
                if len({tuple(row) for row in tables[0].tolist()}) > 1:
                    return column, tables[0]
        return None

    def _probe(self, group: list[int], column: int, draw: np.random.Generator) -> NDArray[np.bool_]:
        table = np.ones((self.sizes[column], len(group)), dtype=bool)
        for value in range(self.sizes[column]):
            code = draw.integers(self.sizes)
            code[column] = value
            for at, slot in enumerate(group):
                seen = set()
                for kind in range(self.sizes[slot]):
                    code[slot] = kind
                    seen.add(self.domain.key(self.decode(code)))
                table[value, at] = len(seen) > 1
        return table

    def _guess_idle(self, group: list[int]) -> tuple[int, NDArray[np.bool_]] | None:
        for column in self.numeric:
            values = list(self.domain.choices[self.names[column]])
            steps = np.diff(values)
            named = re.search(ROLES["layers"], self.names[column], re.IGNORECASE)
            if max(values) == len(group) and min(values) >= 1 and (named or (len(values) > 1 and (steps == 1).all())):
                return column, np.arange(len(group)) < np.array(values)[:, None]
        return None

    def _check_masking(self, draw: np.random.Generator) -> bool:
        """Whether repair does nothing but clear idle slots: then candidates can be compared by their codes alone."""
        if self.domain.repair is None:
            return True
        codes = draw.integers(self.sizes, size=(100, len(self.names)))
        return bool((self.encode([self.decode(code) for code in codes]) == self.mask(codes)).all())

    def _find_roles(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for column in self.numeric:
            name = self.names[column].lower()
            role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
            if role is not None and role not in found:
                found[role] = column
        return found if {"kv", "ffn", "layers", "heads", "hidden"} <= set(found) else {}

    @property
    def knows_size(self) -> bool:
        """Whether the names say enough to tell how large a model is."""
        return bool(self._roles)

    # --- features ---

    def table(self, codes: Codes) -> Table:
        """All features of masked codes."""
        numbers = self._numbers(codes)
        logs = np.log(numbers) if (numbers > 0).all() else numbers
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
        ffn = 3 * of["layers"] * of["hidden"] * of["ffn"]
        attention = 2 * attended * of["hidden"] * head * (of["heads"] + of["kv"])
        total = np.log(ffn + attention)
        return np.stack([total, np.log1p(attention / ffn), np.log(of["hidden"] / of["layers"])], axis=1)

    def _work(self, numbers: Array, counts: Array) -> Array:
        """Every product of at most three sizes and counts, each scaled to 1 at the largest."""
        tops = [float(max(self.domain.choices[self.names[i]])) or 1.0 for i in self.numeric]
        sizes = np.abs(numbers) / np.array(tops) if tops else numbers
        slots = np.array([len(group) for group in self.slot_groups for _ in range(self.sizes[group[0]])], dtype=np.float64)
        base = np.hstack([np.ones((len(numbers), 1)), sizes, counts / slots if len(slots) else counts])
        triples = np.array(list(itertools.combinations_with_replacement(range(base.shape[1]), 3)))
        return base[:, triples].prod(axis=2)


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


def _slot_groups(domain: Domain) -> list[list[int]]:
    """Columns of three or more names that differ by their index only and share their values, in the order of the index."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for column, (name, values) in enumerate(domain.choices.items()):
        if (match := INDEXED.match(name)) and 1 < len(values) <= 8:
            found.setdefault((match[1], str(list(values))), []).append((int(match[2]), column))
    return [[column for _, column in sorted(group)] for group in found.values() if len(group) >= 3]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _columns(parts: Sequence[Array], rows: int) -> Array:
    return np.hstack(parts) if parts else np.empty((rows, 0))


def _hashable(value: Any) -> Any:
    return value if value.__hash__ is not None else str(value)
