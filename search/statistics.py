"""What raw repeats say: a median that outliers do not move, how sure it is, and which repeats stand out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TO_SIGMA = 1.4826
"""Median absolute deviation to standard deviation, for normal values."""
BOOTSTRAPS = 1000


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def outliers(values: Sequence[float], limit: float = 5.0, floor: float = 0.005) -> list[int]:
    """Places of the values more than `limit` scaled median absolute deviations from the median.

    The deviation counts as at least `floor` of the median: five equal repeats would make an outlier of anything.
    """
    x = np.asarray(values, float)
    if len(x) < 3:
        return []
    middle = np.median(x)
    spread = max(TO_SIGMA * float(np.median(np.abs(x - middle))), floor * abs(float(middle)))
    return [int(i) for i in np.flatnonzero(np.abs(x - middle) > limit * spread)]


def _bootstrap(values: Sequence[float]) -> np.ndarray:
    """Medians of samples drawn from the values with replacement; the same for the same values."""
    x = np.asarray(values, float)
    draws = np.random.default_rng(0).integers(0, len(x), (BOOTSTRAPS, len(x)))
    return np.median(x[draws], axis=1)


def standard_error(values: Sequence[float]) -> float:
    """Of the median, by bootstrap (Efron 1979); 0 for a single value, whose error nobody knows."""
    return float(_bootstrap(values).std()) if len(values) > 1 else 0.0


def half_width(values: Sequence[float]) -> float:
    """Half of the bootstrap 95 % interval of the median, as a share of the median."""
    if len(values) < 2:
        return 0.0
    low, high = np.percentile(_bootstrap(values), [2.5, 97.5])
    return float((high - low) / 2 / abs(np.median(values)))
