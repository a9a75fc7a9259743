"""Latency readings bought by the optimizer itself, and the model of them: for spaces of which only names and values are known.

Most readings are taken before the first question, the rest where the search goes. A reading that fails or is no time counts as
taken and is not learned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.base import Flat
from search.optim.encode import Codes, Encoder, Table
from search.optim.pool import Pool, unique
from search.optim.surrogate import Scaler
from search.optim.work import WorkModel, are_times

Array = NDArray[np.float64]
log = logging.getLogger(__name__)
READINGS = 400
FIRST, SECOND, PER_QUESTION = 160, 80, 0.8
"""Readings over the whole space; then near and below the limit; then for each candidate asked for."""
FEWEST = 12
"""Usable readings without which there is no model."""
REFIT = 1.1
"""The process is fitted anew when there are so many times as many values; between, its parameters stay."""


class LatencyStage:
    """Buys, learns, predicts. As `known` of the optimizer it is called with candidates, or asked by features: `of_table`."""

    def __init__(self, encoder: Encoder, limit: float, seed: int, measure: Callable[[Flat], float]) -> None:
        """limit: seconds beyond which a candidate is of no use; measure: one noisy reading in seconds."""
        self._encoder, self._limit, self._measure = encoder, limit, measure
        self._draw = np.random.default_rng([seed, 2**31])
        self._configs: list[Flat] = []
        self._values: list[float] = []
        self._model: WorkModel | None = None
        self._scaler: Scaler | None = None
        self._stale, self._fitted_at, self._owed = True, 0, 0.0
        self._failed = False
        self.taken = 0
        """Readings so far, failed ones too."""

    @property
    def usable(self) -> bool:
        """Whether there are values enough for a model."""
        return len(self._values) >= FEWEST

    def prepare(self) -> bool:
        """The readings before the first question: over the whole space, then where a front within the limit may be.

        False where hardly any of them is a time: then nothing can be predicted.
        """
        pool = Pool(self._encoder, self._draw)
        for code in pool.random(FIRST):
            self._read(self._encoder.decode(code))
        if not self.usable:
            return False
        codes = unique(np.vstack([pool.random(2000), pool.admit(pool.mutate(pool.random(2000)))]))
        for _ in range(6):
            fast = codes[np.argsort(self._predict_codes(codes), kind="stable")[:500]]
            codes = unique(np.vstack([codes, pool.admit(pool.mutate(fast))]))
        times = self._predict_codes(codes)
        near = np.flatnonzero(times < 1.2 * self._limit)
        near = near if len(near) > SECOND else np.argsort(times, kind="stable")[:SECOND]
        # Evenly over the times, not over the candidates, most of which are slow.
        order = near[np.argsort(times[near], kind="stable")]
        wanted = np.linspace(times[order[0]], times[order[-1]], SECOND)
        spots = np.unique(np.searchsorted(times[order], wanted).clip(0, len(order) - 1))
        for code in codes[order[spots]]:
            self._read(self._encoder.decode(code))
        return True

    def follow(self, configs: Sequence[Flat]) -> None:
        """Readings of what was just asked for, as far as they are paid for."""
        self._owed += PER_QUESTION * len(configs)
        for config in configs:
            if self._owed < 1:
                break
            self._owed -= 1
            self._read(config)

    def learn(self, config: Flat, seconds: Any) -> None:
        """A value that came from a reading or with an evaluation."""
        try:
            value = float(seconds)
        except (TypeError, ValueError):
            return
        if are_times(np.array([value])):
            self._configs.append(config)
            self._values.append(value)
            self._stale = True

    def __call__(self, configs: Sequence[Flat]) -> tuple[Array, Array]:
        """Mean and deviation in seconds."""
        return self.of_table(self._encoder.table(self._encoder.encode(configs)))

    def of_table(self, table: Table) -> tuple[Array, Array]:
        """The same of candidates' features."""
        mean, deviation = self._fitted().predict(table)
        return np.exp(mean), np.exp(mean) * deviation

    def _read(self, config: Flat) -> None:
        if self.taken >= READINGS:
            return
        self.taken += 1
        try:
            seconds = self._measure(dict(config))
        except Exception as error:  # somebody else's function: one reading less, not the end of the search
            # Said once: a function that never works would fill the terminal.
            log.log(logging.DEBUG if self._failed else logging.WARNING, "latency reading %d failed: %s: %s", self.taken,
                    type(error).__name__, error)  # fmt: skip
            self._failed = True
            return
        self.learn(config, seconds)

    def _predict_codes(self, codes: Codes) -> Array:
        return self.of_table(self._encoder.table(codes))[0]

    def _fitted(self) -> WorkModel:
        if self._model is None or self._stale:
            if self._scaler is None:
                reference = Pool(self._encoder, np.random.default_rng(0)).random(1500)
                self._scaler = Scaler(self._encoder.table(reference))
            table, values = self._encoder.table(self._encoder.encode(self._configs)), np.array(self._values)
            start = None if self._model is None else self._model.parameters()
            fit = len(values) >= REFIT * self._fitted_at
            self._fitted_at = len(values) if fit else self._fitted_at
            self._model, self._stale = WorkModel(self._scaler, table, values, start, fit=fit), False
        return self._model
