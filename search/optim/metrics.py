"""Models of one metric each: of values that are learned from the answers, and of times, which are sums of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.base import Trial
from search.optim.encode import Table
from search.optim.surrogate import Scaler, Surrogate
from search.optim.work import WorkModel

Array = NDArray[np.float64]


class Modelled:
    """One metric that is learned from the answers, in a scale of its own."""

    sized = True
    """Whether its table holds the stand-in for a candidate's size."""

    def __init__(
        self, scaler: Scaler, table: Table, trials: Sequence[Trial], name: str, bound: float, start: Mapping[str, Any]
    ) -> None:
        """bound: the value beyond which it hardly matters how bad a candidate is."""
        values = compress(np.array([trial.values[name] for trial in trials if trial.values is not None]), bound)
        noise = np.array([(trial.noise or {}).get(name, 0.0) for trial in trials])
        plain = Surrogate(scaler, table, values, noise**2, start.get("plain"))
        self.process, self.is_log, self.started = plain, False, {"plain": plain.parameters()}
        if (values > 0).all() and values.max() > 1.5 * values.min():
            logs = Surrogate(scaler, table, np.log(values), (noise / values) ** 2, start.get("log"))
            self.started["log"] = logs.parameters()
            # A density changes with its scale: the log's Jacobian makes the two comparable.
            if logs.evidence - float(np.log(values).sum()) > plain.evidence:
                self.process, self.is_log = logs, True

    def optimistic(self, table: Table, deviations: float) -> Array:
        mean, deviation = self.process.predict(table)
        return self._back(mean - deviations * deviation)

    def sample(self, table: Table, count: int, draw: np.random.Generator) -> Array:
        return self._back(self.process.sample(table, count, draw))

    def _back(self, values: Array) -> Array:
        return np.exp(np.clip(values, -50, 50)) if self.is_log else values


class Time:
    """A metric that is a sum of work: fitted as such, and taken as known."""

    sized = False

    def __init__(self, scaler: Scaler, table: Table, values: Array, start: Mapping[str, Any]) -> None:
        self.model = WorkModel(scaler, table, values, start.get("work"))
        self.started = {"work": self.model.parameters()}

    def optimistic(self, table: Table, deviations: float) -> Array:
        return np.exp(self.model.predict(table)[0])

    def sample(self, table: Table, count: int, draw: np.random.Generator) -> Array:
        return np.broadcast_to(np.exp(self.model.predict(table)[0]), (count, len(table.dense)))


def compress(values: Array, bound: float) -> Array:
    """The same up to `bound`, logarithmic beyond: a few disasters would else set the scale of all that is fitted."""
    inside = (bound - float(values.min())) / 2
    # With none inside, the better half of the values sets the scale.
    scale = max(inside, 0.0 if inside > 0 else float(np.median(values) - values.min()), 1e-6 * abs(bound), 1e-12)
    excess = np.maximum(values - bound, 0)
    return np.minimum(values, bound) + scale * np.log1p(excess / scale)
