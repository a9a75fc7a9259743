"""Hypervolume, and which candidates are expected to add most of it. Everything is minimised, up to a reference point.

The expectation is over joint draws of all values, those of finished trials included, so noise does not make a front
that is not there: noisy expected hypervolume improvement (Daulton, Balandat, Bakshy 2021, eq. 5) by drawing, greedily for a
batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def front(values: Array) -> NDArray[np.intp]:
    """Indices of the undominated rows of [points, objectives], each value once, in the order of the first objective."""
    order = np.lexsort(values.T[::-1])
    kept: list[int] = []
    for i in order:
        if not any((values[j] <= values[i]).all() for j in kept):
            kept.append(int(i))
    return np.array(kept, dtype=np.intp)


def hypervolume(values: Array, reference: Array) -> float:
    """Volume that the rows of [points, objectives] dominate, below the reference."""
    inside = values[(values < reference).all(axis=1)] if len(values) else values
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    if inside.shape[1] == 2:
        points = inside[front(inside)]
        return float(((np.append(points[1:, 0], reference[0]) - points[:, 0]) * (reference[1] - points[:, 1])).sum())
    import torch
    from botorch.utils.multi_objective.hypervolume import Hypervolume

    return float(Hypervolume(torch.tensor(-reference)).compute(torch.tensor(-inside[front(inside)])))


def choose_batch(base: Array, pool: Array, reference: Array, count: int, weights: Array | None = None) -> list[int]:
    """Indices of `count` candidates, greedily: each adds most, on average over the draws, to base and those before it.

    base: [draws, trials, objectives]; pool: [draws, candidates, objectives], both infinite where a limit is broken; weights:
    [candidates], the chance that a candidate can be evaluated at all. May return fewer where no candidate adds anything.
    """
    weights = np.ones(pool.shape[1]) if weights is None else weights
    alive = np.arange(pool.shape[1])
    picked: list[int] = []
    for _ in range(count):
        gain = improvements(base, pool[:, alive], reference).mean(axis=0) * weights[alive]
        gain[np.isin(alive, picked)] = -1
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        picked.append(int(alive[best]))
        base = np.concatenate([base, pool[:, alive[best : best + 1]]], axis=1)
        # A gain only shrinks as the base grows: what is far behind now cannot come first soon.
        alive = alive[np.argsort(-gain, kind="stable")[:400]]
    return picked


def improvements(base: Array, pool: Array, reference: Array) -> Array:
    """[draws, candidates]: what each candidate alone would add."""
    if pool.shape[2] == 1:
        best = np.minimum(base.min(axis=1, initial=np.inf), reference)
        return np.maximum(best - pool[:, :, 0], 0)
    if pool.shape[2] == 2:
        return np.stack([_improve_two(b, p, reference) for b, p in zip(base, pool, strict=True)])
    return np.stack([_improve_many(b, p, reference) for b, p in zip(base, pool, strict=True)])


def _improve_two(base: Array, pool: Array, reference: Array) -> Array:
    """The area between a candidate and the staircase: piece by piece of the staircase."""
    inside = base[(base < reference).all(axis=1)]
    if len(inside):
        inside = inside[np.argsort(inside[:, 0], kind="stable")]
        lowest = np.minimum.accumulate(inside[:, 1])
        steps = np.concatenate([[True], lowest[1:] < lowest[:-1]])
        inside = inside[steps]
    left = np.concatenate([[-np.inf], inside[:, 0]])
    right = np.append(inside[:, 0], reference[0])
    height = np.concatenate([[reference[1]], inside[:, 1]])
    width = np.maximum(right - np.maximum(left, pool[:, :1]), 0)
    return (width * np.maximum(height - pool[:, 1:], 0)).sum(axis=1)


def _improve_many(base: Array, pool: Array, reference: Array) -> Array:
    """By the boxes of what the base does not dominate (BoTorch)."""
    import torch
    from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning

    inside = base[(base < reference).all(axis=1)]
    inside = inside[front(inside)] if len(inside) else inside
    boxes = FastNondominatedPartitioning(torch.tensor(-reference), torch.tensor(-inside)).get_hypercell_bounds().numpy()
    lower, upper = boxes
    sides = np.minimum(-pool[:, None, :], upper[None]) - lower[None]
    return np.maximum(sides, 0).prod(axis=2).sum(axis=1)
