"""The optimizer behind the face of outside benchmarks: `factory(...)` gives an object with `ask` and `tell`.

Nothing is known beforehand of the names in `space`. Where cheap latency readings are to be had, at most `READINGS` are taken:
most before the first question, the rest where the search goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from search.optim.base import Domain, Flat, Goal
from search.optim.pool import Pool, unique
from search.optim.staged import Array, Settings, Staged
from search.optim.work import WorkModel

READINGS = 400
FIRST, SECOND, PER_QUESTION = 160, 80, 0.8
"""Readings over the whole space; then near and below the reference; then for each candidate asked for."""


def factory(
    space: Mapping[str, Sequence[Any]], reference_point: Mapping[str, float], seed: int,
    measure_latency: Callable[[Flat], float] | None = None, repair: Callable[[Flat], Flat] | None = None,
) -> BenchSearch:
    """space: name -> ordered values; reference_point: {"loss": x, "ttft": seconds}, both minimised.

    measure_latency(config): one noisy reading in seconds; repair(config): the config with idle slots cleared. Raises
    ValueError.
    """
    if missing := {"loss", "ttft"} - set(reference_point):
        raise ValueError(f"reference_point lacks {sorted(missing)[0]}; expected loss and ttft")
    return BenchSearch(Domain(choices=space, repair=repair), reference_point, seed, measure_latency)


class BenchSearch:
    """See `factory`."""

    def __init__(
        self, domain: Domain, reference: Mapping[str, float], seed: int, measure: Callable[[Flat], float] | None
    ) -> None:
        goal = Goal(objectives={"ttft": float(reference["ttft"]), "loss": float(reference["loss"])})
        self._stage = None if measure is None else LatencyStage(domain, goal.objectives["ttft"], seed, measure)
        known = {} if self._stage is None else {"ttft": self._stage.predict}
        # An outside function that fails now and then may succeed the second time.
        self._search = Staged(domain, goal, seed, known=known, times=("ttft",), retries=1,
                              settings=Settings(initial=12 if measure is None else 16))  # fmt: skip
        if self._stage is not None:
            self._stage.attach(self._search)

    @property
    def readings(self) -> int:
        """Latency readings taken so far."""
        return 0 if self._stage is None else self._stage.taken

    def ask(self, n: int) -> list[tuple[int, Flat]]:
        """`n` candidates to evaluate: (token, config)."""
        if self._stage is not None:
            self._stage.prepare()
        asked = self._search.ask(n)
        if self._stage is not None:
            self._stage.follow([config for _, config in asked])
        return asked

    def tell(self, token: int, values: Mapping[str, float] | None) -> None:
        """{"loss", "ttft"}, or None for an evaluation that failed."""
        self._search.tell(token, values)
        if values is not None and self._stage is not None:
            self._stage.learn(self._search.trials[token].config, float(values["ttft"]))


class LatencyStage:
    """Readings of latency, bought in three portions, and the model of them."""

    def __init__(self, domain: Domain, limit: float, seed: int, measure: Callable[[Flat], float]) -> None:
        self._domain, self._limit, self._measure = domain, limit, measure
        self._draw = np.random.default_rng([seed, 2**31])
        self._configs: list[Flat] = []
        self._values: list[float] = []
        self._search: Staged | None = None
        self._model: WorkModel | None = None
        self._stale = True
        self._owed = 0.0
        self.taken = 0

    def attach(self, search: Staged) -> None:
        """The search whose encoder is used."""
        self._search = search

    def prepare(self) -> None:
        """The readings before the first question: over the whole space, then where a front within the limit may be."""
        if self.taken:
            return
        pool = self._pool()
        for code in pool.random(FIRST):
            self._read(self._encoder.decode(code))
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

    def follow(self, configs: Sequence[Flat]) -> None:
        """Readings of what was just asked for, as far as they are paid for."""
        self._owed += PER_QUESTION * len(configs)
        for config in configs:
            if self._owed < 1:
                break
            self._owed -= 1
            self._read(config)

    def learn(self, config: Flat, seconds: float) -> None:
        """A value that came with an evaluation."""
        if math.isfinite(seconds) and seconds > 0:
            self._configs.append(config)
            self._values.append(seconds)
            self._stale = True

    def predict(self, configs: Sequence[Flat]) -> tuple[Array, Array]:
        """Mean and deviation in seconds."""
        mean, deviation = self._fitted().predict(self._encoder.table(self._encoder.encode(configs)))
        return np.exp(mean), np.exp(mean) * deviation

    def _read(self, config: Flat) -> None:
        if self.taken < READINGS:
            self.taken += 1
            self.learn(config, float(self._measure(dict(config))))

    def _predict_codes(self, codes: Any) -> Array:
        return np.exp(self._fitted().predict(self._encoder.table(codes))[0])

    def _fitted(self) -> WorkModel:
        if self._model is None or self._stale:
            assert self._search is not None
            if len(self._values) < 5:
                raise ValueError(f"{len(self._values)} usable latency readings of {self.taken}; expected seconds above 0")
            table = self._encoder.table(self._encoder.encode(self._configs))
            start = None if self._model is None else self._model.parameters()
            self._model = WorkModel(self._search._standard(), table, np.array(self._values), start)
            self._stale = False
        return self._model

    @property
    def _encoder(self) -> Any:
        assert self._search is not None
        return self._search.encoder

    def _pool(self) -> Pool:
        return Pool(self._encoder, self._draw)
