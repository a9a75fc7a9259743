"""Candidates worth a closer look: evolved on a model's predictions, which cost next to nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from search.optim.encode import Codes, Encoder

Array = NDArray[np.float64]
Score = Callable[[Codes], Array]
"""[candidates] -> [candidates, objectives], minimised, optimistic or plain; infinite where a limit is broken."""


class Pool:
    """Makes canonical, feasible codes: random ones, changed ones, and by evolution."""

    def __init__(self, encoder: Encoder, draw: np.random.Generator) -> None:
        self.encoder, self.draw = encoder, draw
        self._checked: dict[bytes, bool] = {}

    def random(self, count: int) -> Codes:
        """Distinct, and fewer than `count` only where filters leave few."""
        found = self.admit(self._draw_codes(2 * count))
        for _ in range(20):
            if len(found) >= count:
                break
            found = unique(np.vstack([found, self.admit(self._draw_codes(8 * count))]))
        return found[self.draw.permutation(len(found))[:count]]

    def _draw_codes(self, count: int) -> Codes:
        """Values uniform, but each candidate has its own mixture of kinds for its slots.

        Kinds drawn slot by slot would all but always come in equal parts: hardly a long run, hardly a lone exception.
        """
        codes = self.draw.integers(self.encoder.sizes, size=(count, len(self.encoder.sizes)))
        for group in self.encoder.slot_groups:
            kinds = int(self.encoder.sizes[group[0]])
            edges = np.cumsum(self.draw.dirichlet(np.ones(kinds), size=count), axis=1)
            chances = self.draw.random((count, len(group)))
            codes[:, group] = (chances[:, :, None] > edges[:, None, :-1]).sum(axis=2)
        return codes

    def admit(self, codes: Codes) -> Codes:
        """Canonical, distinct, feasible."""
        encoder = self.encoder
        if not encoder.repair_is_masking:
            codes = encoder.encode([encoder.decode(code) for code in codes])
        codes = unique(encoder.mask(codes))
        if encoder.domain.feasible is None:
            return codes
        return codes[[self._is_feasible(code) for code in codes]] if len(codes) else codes

    def _is_feasible(self, code: NDArray[np.int64]) -> bool:
        key = code.tobytes()
        if key not in self._checked:
            self._checked[key] = self.encoder.domain.is_feasible(self.encoder.decode(code))
        return self._checked[key]

    def mutate(self, parents: Codes) -> Codes:
        """One to three changes each: a step of a size, another kind in a slot, two neighbouring slots swapped."""
        children, draw, sizes = parents.copy(), self.draw, self.encoder.sizes
        movable = np.flatnonzero(sizes > 1)
        if not len(movable) or not len(parents):
            return children
        jumps = np.isin(np.arange(len(sizes)), [*itertools.chain(*self.encoder.slot_groups), *self.encoder.categories])
        slots = set(itertools.chain(*self.encoder.slot_groups))
        stepped = np.array([column for column in movable if column not in slots], dtype=np.intp)
        changes = 1 + draw.binomial(2, 0.4, size=len(parents))
        for turn in range(3):
            rows = np.flatnonzero(changes > turn)
            columns = movable[draw.integers(len(movable), size=len(rows))]
            if len(stepped):
                columns = np.where(draw.random(len(rows)) < 0.5, stepped[draw.integers(len(stepped), size=len(rows))], columns)
            step = draw.choice((-2, -1, 1, 2), p=(0.15, 0.35, 0.35, 0.15), size=len(rows))
            near = np.clip(children[rows, columns] + step, 0, sizes[columns] - 1)
            jump = jumps[columns] | (draw.random(len(rows)) < 0.2)
            children[rows, columns] = np.where(jump, draw.integers(sizes[columns]), near)
        if self.encoder.slot_groups:
            for row in np.flatnonzero(draw.random(len(children)) < 0.3):
                group = self.encoder.slot_groups[draw.integers(len(self.encoder.slot_groups))]
                at = draw.integers(len(group) - 1)
                children[row, [group[at], group[at + 1]]] = children[row, [group[at + 1], group[at]]]
        return children

    def cross(self, parents: Codes) -> Codes:
        """Every name from one of two parents, slots from a cut onwards."""
        mothers, fathers = parents[self.draw.permutation(len(parents))], parents
        take = self.draw.random(parents.shape) < 0.5
        for group in self.encoder.slot_groups:
            cut = self.draw.integers(len(group) + 1, size=(len(parents), 1))
            take[:, group] = np.arange(len(group)) < cut
        return np.where(take, mothers, fathers)

    def neighbours(self, codes: Codes) -> Codes:
        """All single changes: the next value up and down of a size, every other kind of a slot or category."""
        slots = {column for group in self.encoder.slot_groups for column in group} | set(self.encoder.categories)
        found = []
        for column in np.flatnonzero(self.encoder.sizes > 1):
            size = self.encoder.sizes[column]
            options = range(1, size) if column in slots else (-1, 1)
            for step in options:
                other = codes.copy()
                moved = other[:, column] + step
                other[:, column] = moved % size if column in slots else np.clip(moved, 0, size - 1)
                found.append(other)
        return self.admit(np.vstack(found)) if found else codes[:0]

    def evolve(self, score: Score, start: Codes, reference: Array, *, size: int, generations: int) -> Codes:
        """The best of everything seen, at most `size`, layer by layer of undominated candidates within the reference.

        A few rounds of variation of the best (NSGA-II's selection, Deb et al. 2002), then single changes of the front.
        """
        seen, values = start, score(start)
        for generation in range(generations):
            parents = seen[best_layers(values, reference, size // 2)]
            children = self.mutate(parents) if generation % 2 else self.mutate(self.cross(parents))
            if generation == generations - 1:
                edge = parents[: max(24, size // 20)]
                children = np.vstack([children, self.neighbours(edge)])
            children = self.admit(children)
            seen, index = np.unique(np.vstack([seen, children]), axis=0, return_index=True)
            fresh = index >= len(values)
            merged = np.empty((len(seen), values.shape[1]))
            merged[~fresh] = values[index[~fresh]]
            if fresh.any():
                merged[fresh] = score(seen[fresh])
            values = merged
            keep = best_layers(values, reference, 3 * size)
            seen, values = seen[keep], values[keep]
        return seen[best_layers(values, reference, size)]


def unique(codes: Codes) -> Codes:
    return np.unique(codes, axis=0) if len(codes) else codes


def best_layers(values: Array, reference: Array, count: int) -> NDArray[np.intp]:
    """Indices of `count` rows of [candidates, objectives]: whole layers, the last one thinned evenly; the rest by excess."""
    usable = np.isfinite(values).all(axis=1)
    inside = np.flatnonzero(usable & (values <= reference).all(axis=1))
    chosen: list[int] = []
    while len(inside) and len(chosen) < count:
        layer = inside[undominated(values[inside])]
        room = count - len(chosen)
        if len(layer) > room:
            layer = layer[np.argsort(values[layer, 0], kind="stable")][np.linspace(0, len(layer) - 1, room).astype(int)]
        chosen.extend(layer.tolist())
        inside = np.setdiff1d(inside, layer, assume_unique=True)
    if len(chosen) < count:
        rest = np.setdiff1d(np.flatnonzero(usable), chosen)
        excess = np.maximum(values[rest] - reference, 0) / (np.abs(reference) + 1e-12)
        chosen.extend(rest[np.argsort(excess.sum(axis=1), kind="stable")][: count - len(chosen)].tolist())
    return np.array(chosen, dtype=np.intp)


def undominated(values: Array) -> NDArray[np.bool_]:
    """[candidates]: for two objectives by one sort, else pair by pair."""
    if values.shape[1] == 2:
        order = np.lexsort((values[:, 1], values[:, 0]))
        second = values[order, 1]
        before = np.concatenate([[np.inf], np.minimum.accumulate(second)[:-1]])
        found = np.zeros(len(values), dtype=bool)
        found[order[second < before]] = True
        return found
    found = np.ones(len(values), dtype=bool)
    for i, row in enumerate(values):
        if found[i]:
            beaten = (values >= row).all(axis=1) & (values > row).any(axis=1)
            found &= ~beaten
    return found
