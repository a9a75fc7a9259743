"""A weighted sum of the features with weights of at least 0, fitted to relative errors with Huber's loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Array = NDArray[np.float64]
HUBER = 1.345
"""Residuals beyond so many deviations count linearly: 95 % efficient for normal noise (Huber 1964)."""


def fit_linear(features: Array, values: Array, variances: Array, *, rounds: int = 12) -> Array:
    """Weights [features] >= 0 of the best sum, in the values' unit a feature's unit.

    features: [points, features] >= 0; values: [points] > 0; variances: [points], of log values. Minimises Huber's loss of
    relative residuals by re-weighting least squares. A negative weight would say that work saves time: excluded, which
    also keeps the sum sane outside the fitted range.
    """
    scale = np.maximum(np.abs(features).max(axis=0), 1e-12)
    relative = features / scale / values[:, None]
    known = np.sqrt(variances + np.median(variances) + 1e-8)
    weights = 1 / known
    found = np.zeros(features.shape[1])
    # A whisper of ridge decides between columns that the points cannot tell apart.
    ridge = 1e-4 * np.sqrt(len(values)) * np.eye(features.shape[1]) / np.median(values) / np.median(known)
    for _ in range(rounds):
        system = np.vstack([relative * weights[:, None], ridge])
        target = np.concatenate([weights, np.zeros(len(ridge))])
        found, _ = nnls(system, target)
        residual = (relative @ found - 1) / known
        spread = max(1.4826 * float(np.median(np.abs(residual - np.median(residual)))), 1e-6)
        weights = np.sqrt(np.minimum(1, HUBER * spread / np.maximum(np.abs(residual), 1e-12))) / known
    return found / scale


def predict_linear(features: Array, weights: Array, floor: float) -> Array:
    """[points] sums, not below `floor`: a log is taken of them."""
    return np.maximum(features @ weights, floor)


def robust_spread(residuals: Array) -> float:
    """Standard deviation from the median absolute deviation: outliers do not count."""
    return max(1.4826 * float(np.median(np.abs(residuals - np.median(residuals)))), 1e-6)
