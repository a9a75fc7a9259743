"""Which trials are on the front: nothing is at least as good in everything and better in something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from search.optim.hypervolume import front as undominated
from search.records import Trial

Values = Mapping[str, float]


def front(trials: Sequence[Trial], objectives: Iterable[str], limits: Values | None = None) -> list[Trial]:
    """The undominated trials that have every objective and keep every limit, best first in the first objective. Of equal
    points one is kept."""
    names = list(objectives)
    good = [trial for trial in trials if trial.results is not None and all(name in trial.results for name in names)
            and all(trial.results.get(name, np.inf) <= bound for name, bound in (limits or {}).items())]  # fmt: skip
    return [good[i] for i in undominated(_points(good, names))] if good else []


def spread(trials: Sequence[Trial], names: Sequence[str], count: int) -> list[Trial]:
    """At most `count` of a front: its ends, and then whichever is farthest from those taken (each objective to unit range)."""
    if len(trials) <= count:
        return list(trials)
    points = _unit(_points(trials, names))
    taken = [int(points[:, 0].argmin())]
    while len(taken) < count:
        distance = np.min([np.linalg.norm(points - points[i], axis=1) for i in taken], axis=0)
        taken.append(int(distance.argmax()))
    return [trials[i] for i in sorted(taken)]


def knee(trials: Sequence[Trial], names: Sequence[str]) -> list[Trial]:
    """The front's trials, those first that give up least in all objectives together (each to unit range)."""
    if len(trials) < 3:
        return list(trials)
    return [trials[i] for i in np.argsort(_unit(_points(trials, names)).sum(1), kind="stable")]


def _points(trials: Sequence[Trial], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[(trial.results or {})[name] for name in names] for trial in trials], dtype=np.float64)


def _unit(points: NDArray[np.float64]) -> NDArray[np.float64]:
    return (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
