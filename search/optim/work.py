"""A time as a sum of products of sizes and counts, with a small Gaussian process for what the sum leaves.

For metrics of which only names and readings are known: `search.latency` does the same with features of a real model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.latency.linear import fit_linear, predict_linear, robust_spread
from search.optim.encode import Table
from search.optim.surrogate import Scaler, Surrogate

Array = NDArray[np.float64]
ROUNDS = 3
SHORTEST, LONGEST = 1e-100, 1e100
"""Squares of times and of their inverses must be finite."""


class WorkModel:
    """Of positive values; fitted on construction. Everything it says is about the log of the value."""

    def __init__(
        self, scaler: Scaler, table: Table, values: Array, start: Mapping[str, Any] | None = None, *, fit: bool = True
    ) -> None:
        """table: of the readings; values: [readings] > 0; start, fit: as of `Surrogate`."""
        variances = np.full(len(values), 1e-4)
        self._floor = 0.3 * float(values.min())
        self._weights = fit_linear(table.work, values, variances)
        self._levels = np.zeros(table.levels.shape[1])
        for _ in range(ROUNDS):
            # Some widths are slower than their work says (no multiple of a tile): one factor for each value of a size.
            left = np.log(values) - np.log(predict_linear(table.work, self._weights, self._floor))
            self._levels = _robust_ridge(table.levels, left)
            self._weights = fit_linear(table.work, values / np.exp(table.levels @ self._levels), variances)
        residual = np.log(values) - self._sum(table)
        spread = robust_spread(residual)
        # A reading far off (another program ran) keeps its place in the data but loses its weight.
        off = np.abs(residual - np.median(residual)) > np.maximum(4 * spread, 0.03)
        self._process = Surrogate(scaler, table, residual, np.where(off, residual**2, 0.0), start, fit=fit)

    def parameters(self) -> dict[str, Any]:
        """To start the next fit from."""
        return self._process.parameters()

    def predict(self, table: Table) -> tuple[Array, Array]:
        """Mean and standard deviation of the log, [candidates] each."""
        more, deviation = self._process.predict(table)
        return self._sum(table) + more, deviation

    def _sum(self, table: Table) -> Array:
        work: Array = np.log(predict_linear(table.work, self._weights, self._floor))
        return work + table.levels @ self._levels


def are_times(values: Array) -> bool:
    """Whether a model can be made of them."""
    return bool(((values > SHORTEST) & (values < LONGEST)).all())


def _robust_ridge(columns: Array, targets: Array) -> Array:
    """Weights of least squares with a small ridge, outliers taken back to where Huber's loss puts them."""
    # Solved by rows where there are fewer: a size may have a thousand values, and at most some hundreds were read.
    wide = columns.shape[1] > len(columns)
    found: Array = np.zeros(columns.shape[1])
    clipped = targets - np.median(targets)
    for _ in range(5):
        if wide:
            gram = columns @ columns.T + np.eye(len(columns))
            found = columns.T @ np.asarray(np.linalg.solve(gram, clipped), dtype=np.float64)
        else:
            gram = columns.T @ columns + np.eye(columns.shape[1])
            found = np.asarray(np.linalg.solve(gram, columns.T @ clipped), dtype=np.float64)
        residual = targets - np.median(targets) - columns @ found
        bound = 2 * robust_spread(residual)
        clipped = columns @ found + np.clip(residual, -bound, bound)
    return found
