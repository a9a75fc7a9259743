"""Which trials are on the front: nothing is at least as good in everything and better in something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from search.records import Trial

Values = Mapping[str, float]


def values_of(trial: Trial) -> dict[str, float]:
    """What a trial counts as: measured where it was measured, predicted where not. Empty without results."""
    found = dict(trial.results or {})
    if found and "ttft_ms" not in found and "predicted_ttft_ms" in found:
        found["ttft_ms"] = found["predicted_ttft_ms"]
    return found


def dominated(point: Values, others: Sequence[Values], names: Sequence[str]) -> bool:
    """Whether one of `others` is at least as good in all names and better in one; smaller is better."""
    own = np.array([point[name] for name in names])
    for other in others:
        values = np.array([other[name] for name in names])
        if (values <= own).all() and (values < own).any():
            return True
    return False


def front(trials: Sequence[Trial], references: Values, limits: Values | None = None) -> list[Trial]:
    """The undominated trials better than every reference and within every limit, best first in the first objective.

    Of equal points the first is kept.
    """
    bounds = {**dict(limits or {}), **{name: min(value, (limits or {}).get(name, value)) for name, value in references.items()}}
    good = []
    for trial in trials:
        values = values_of(trial)
        if all(name in values and values[name] <= bound for name, bound in bounds.items()):
            good.append((trial, values))
    names = list(references)
    kept: list[tuple[Trial, dict[str, float]]] = []
    for trial, values in good:
        if dominated(values, [other for _, other in good], names):
            continue
        if not any(all(values[name] == other[name] for name in names) for _, other in kept):
            kept.append((trial, values))
    return [trial for trial, values in sorted(kept, key=lambda pair: [pair[1][name] for name in names])]


def spread(trials: Sequence[Trial], names: Sequence[str], count: int) -> list[Trial]:
    """At most `count` of a front: its ends, and then whichever is farthest from those taken (each objective to unit range)."""
    if len(trials) <= count:
        return list(trials)
    points = np.array([[values_of(trial)[name] for name in names] for trial in trials])
    points = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    taken = [int(points[:, 0].argmin())]
    while len(taken) < count:
        distance = np.min([np.linalg.norm(points - points[i], axis=1) for i in taken], axis=0)
        taken.append(int(distance.argmax()))
    return [trials[i] for i in sorted(taken)]


def knee(trials: Sequence[Trial], names: Sequence[str]) -> list[Trial]:
    """The front's trials, those first that lie farthest below the line between its ends: most gained for least given up."""
    if len(trials) < 3:
        return list(trials)
    points = np.array([[values_of(trial)[name] for name in names] for trial in trials])
    points = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-12)
    return [trials[i] for i in np.argsort(points.sum(1), kind="stable")]
