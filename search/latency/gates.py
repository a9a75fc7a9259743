"""When a latency model may be used: figures on held-out readings, and the smallest that are good enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LIMITS: dict[str, tuple[float, float]] = {
    "r2": (0.97, 1.0), "mape": (0.0, 5.0), "within_10": (90.0, 100.0), "spearman": (0.97, 1.0), "coverage": (90.0, 99.0),
}  # fmt: skip
"""Name -> from, to."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of one model, by cross-validation. Percentages where it says so."""

    kind: str
    readings: int
    r2: float
    """Of the values, not of their logs."""
    mape: float
    """Mean absolute error, % of the value."""
    within_10: float
    """% of the readings that are less than 10 % off."""
    within_5: float
    spearman: float
    kendall: float
    coverage: float
    """% of the readings inside the calibrated 95 % band, calibrated on the other folds."""
    raw_coverage: float
    """The same before calibration."""

    def failures(self) -> list[str]:
        """The gates that are not met, in words."""
        found = []
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                found.append(f"{name} is {value:.4g}, expected {low:g} to {high:g}")
        return found

    @property
    def passed(self) -> bool:
        return not self.failures()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with `passed` and `failures`."""
        return {**asdict(self), "passed": self.passed, "failures": self.failures()}


def make_report(kind: str, truth: Array, mean: Array, deviation: Array, folds: int) -> Report:
    """From logs: what was read, and held-out mean and deviation, [readings] each."""
    distance = np.abs(truth - mean) / deviation
    inside = np.empty(len(truth), dtype=bool)
    order = np.random.default_rng(1).permutation(len(truth))
    for fold in range(folds):
        held = order[fold::folds]
        rest = np.setdiff1d(order, held)
        inside[held] = distance[held] <= np.clip(np.quantile(distance[rest], 0.95), 0.5 * 1.96, 10 * 1.96)
    values, predicted = np.exp(truth), np.exp(mean)
    return Report(
        kind=kind, readings=len(truth), coverage=100 * float(inside.mean()),
        raw_coverage=100 * float((distance <= 1.96).mean()), **errors(values, predicted))


def errors(values: Array, predicted: Array) -> dict[str, float]:
    """r2, mape, within_10, within_5, spearman, kendall of predictions of positive values."""
    from scipy.stats import kendalltau, spearmanr  # half of what `sweep.py status` would take to start

    off = np.abs(predicted / values - 1)
    spread = float(((values - values.mean()) ** 2).sum())
    return {
        "r2": 1 - float(((values - predicted) ** 2).sum()) / spread if spread > 0 else 0.0,
        "mape": 100 * float(off.mean()), "within_10": 100 * float((off <= 0.1).mean()),
        "within_5": 100 * float((off <= 0.05).mean()), "spearman": _rank(spearmanr, values, predicted),
        "kendall": _rank(kendalltau, values, predicted),
    }  # fmt: skip


def _rank(measure: Any, values: Array, predicted: Array) -> float:
    """A rank correlation; 0 where one side is constant."""
    if np.ptp(values) == 0 or np.ptp(predicted) == 0:
        return 0.0
    return float(measure(values, predicted).statistic)
