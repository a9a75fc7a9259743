"""What it says of the front that its models were measured and scored a second time: intervals of both, and who is out.

A search picks the best of many noisy numbers, so a winner's first number flatters it; the second one was not picked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from launch.sweep_data import FrontPoint, Limit, Numbers, Objective, Pair, TrialRecord
from launch.sweep_text import interval, limit_words

if TYPE_CHECKING:
    from search.store import Store

_NAMES = {"losses": "loss"}
"""What an event `confirmed` calls a result, where that is another name."""

MEDIAN_OF_CHI2 = 0.4549
"""Of one degree of freedom."""


@dataclass(frozen=True)
class Sample:
    """Every number there is of one result of one trial, the search's first."""

    values: tuple[float, ...]
    errors: tuple[float, ...]
    """Standard error of each; 0 where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """Of one trial."""

    again: Numbers
    """The second value of a result, where it was had."""
    intervals: Mapping[str, Pair]
    reason: str = ""
    """Why a second value was not had."""


def confirmations(store: Store, trials: Sequence[TrialRecord]) -> dict[int, Confirmation]:
    """By trial: what the events `confirmed` say. Those of older searches have no errors."""
    known = {trial.number: trial for trial in trials}
    samples: dict[str, dict[int, Sample]] = {}
    again: dict[int, dict[str, float]] = {}
    reasons: dict[int, str] = {}
    for event in store.events("confirmed"):
        trial = known.get(event.trial) if event.trial is not None else None
        if trial is None:
            continue
        again[trial.number], reasons[trial.number] = {}, str(event.detail.get("reason") or "")
        errors = event.detail.get("errors")
        for key, values in event.detail.items():
            name = _NAMES.get(key, key)
            if not isinstance(values, list) or name not in (trial.results or {}):
                continue
            more = [float(value) for value in values[1:] if _is_number(value)]
            if more:
                again[trial.number][name] = more[0]
            first = (trial.results or {})[name]  # as it counts now: the event has what counted then
            error = errors.get(name) if isinstance(errors, Mapping) else None
            second = float(error) if error is not None and _is_number(error) else 0.0
            found = [trial.noise.get(name, 0.0), *[second] * len(more)]
            samples.setdefault(name, {})[trial.number] = Sample((first, *more), tuple(found))
    ends = {name: intervals(of) for name, of in samples.items()}
    return {number: Confirmation(again=again[number], reason=reasons[number],
                                 intervals={name: found[number] for name, found in ends.items() if number in found})
            for number in again}  # fmt: skip


def intervals(samples: Mapping[int, Sample]) -> dict[int, Pair]:
    """95 % intervals of one result, by trial.

    Where each number comes with its error, the numbers are weighted by it, and the error of their mean is widened by
    sqrt(chi2 / degrees of freedom) where they differ by more than their errors allow (the scale factor of the Particle Data
    Group, Review of Particle Physics, 5.2.2): by the trial's own or by the middle one of all, whichever is larger, since
    two runs hours apart differ by more than one run's repeats show, and one that went wrong says nothing of the others.
    Where errors are not known, as of a loss, the differences between the numbers of all trials are the only measure of it:
    one relative deviation for all, and Student's t for how few they are. Without any difference there is no interval.
    """
    given = all(min(sample.errors) > 0 for sample in samples.values())
    means, errors, squares, free = {}, {}, {}, {}
    for number, sample in samples.items():
        sizes = sample.errors if given else tuple(abs(value) for value in sample.values)
        if not all(sizes):
            continue
        weights = [size**-2 for size in sizes]
        mean = sum(weight * value for weight, value in zip(weights, sample.values, strict=True)) / sum(weights)
        means[number], errors[number], free[number] = mean, sum(weights) ** -0.5, len(sizes) - 1
        squares[number] = sum(((value - mean) / size) ** 2 for value, size in zip(sample.values, sizes, strict=True))
    degrees = sum(free.values())
    if not given and not degrees:
        return {}
    usual = median(squares[number] / free[number] for number in squares if free[number]) / MEDIAN_OF_CHI2 if degrees else 1.0
    pooled = sum(squares.values()) / degrees if degrees else 1.0
    times = 1.96 if given else _student(degrees)
    found = {}
    for number, mean in means.items():
        own = squares[number] / free[number] if free[number] else 0.0
        half = times * errors[number] * math.sqrt(max(1.0, own, usual) if given else pooled)
        found[number] = (mean - half, mean + half)
    return found


def confirm(
    front: Sequence[FrontPoint], found: Mapping[int, Confirmation], objectives: Sequence[Objective], limits: Sequence[Limit]
) -> tuple[tuple[FrontPoint, ...], tuple[FrontPoint, ...]]:
    """(the front, what is dropped from it), with confirmed intervals.

    A point is dropped where another confirmed one is better in every objective even at the worse ends of its intervals, or
    where its whole interval is over a limit. A point that was not confirmed neither drops another nor is dropped.
    """
    points = [replace(point, again=seen.again, confirmed=bool(seen.again), intervals={**point.intervals, **seen.intervals},
                      reason=seen.reason) if (seen := found.get(point.trial)) else point for point in front]  # fmt: skip
    sure = [point for point in points if point.confirmed and all(goal.name in point.intervals for goal in objectives)]
    out = {point.trial: reason for point in points if point.confirmed and (reason := _over(point, limits))}
    for point in sure:
        better = next((other for other in sure if other is not point and _dominates(other, point, objectives)), None)
        if better is not None:
            out.setdefault(point.trial, f"trial {better.trial} is better in everything, also at the worse ends of its interval")
    kept = tuple(point for point in points if point.trial not in out)
    return kept, tuple(replace(point, reason=out[point.trial]) for point in points if point.trial in out)


def _over(point: FrontPoint, limits: Sequence[Limit]) -> str:
    """Which limit the whole interval is over, in words."""
    for limit in limits:
        ends = point.intervals.get(limit.name)
        if ends and not any(limit.sign * end <= limit.sign * limit.value for end in ends):
            return f"confirmed {limit.words} is {interval(ends, limit)}, wanted {limit_words(limit)}"
    return ""


def _dominates(one: FrontPoint, other: FrontPoint, objectives: Sequence[Objective]) -> bool:
    worst = [max(goal.sign * end for end in one.intervals[goal.name]) for goal in objectives]
    best = [min(goal.sign * end for end in other.intervals[goal.name]) for goal in objectives]
    return worst != best and all(a <= b for a, b in zip(worst, best, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _student(degrees: int) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # without scipy.stats, which is slow to import

    return float(stdtrit(degrees, 0.975))
