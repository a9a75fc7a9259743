"""The default optimizer: what is cheap to know is predicted, what is costly is modelled, and the front is looked for in both.

Latency (and memory) come from a model that was paid for beforehand (MobileLLM-Flash's two stages); quality gets a Gaussian
process on features of the candidate. At each ask: evolve a pool of candidates on the predictions, draw all values of pool and
trials jointly, take the batch that adds most hypervolume on average. Pending trials take part as draws without an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.base import Book, Domain, Flat, Goal, Trial
from search.optim.encode import Codes, Encoder, Table
from search.optim.hypervolume import choose_batch
from search.optim.pool import Pool, unique
from search.optim.surrogate import Scaler, Surrogate
from search.optim.work import WorkModel

Array = NDArray[np.float64]
Known = Callable[[Sequence[Flat]], tuple[Array, Array]]
"""Candidates -> mean and standard deviation of a metric, in its unit."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the search may cost; the defaults answer ask(8) at 200 trials in about a second on one core."""

    initial: int = 16
    """Answers before the first model."""
    pool: int = 1000
    """Candidates that are looked at closely."""
    generations: int = 10
    draws: int = 64
    optimism: tuple[float, ...] = (0.3, 1.5)
    """Deviations below the mean at which the pool's candidates compete: one evolution for each."""


class _Modelled:
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


class _Time:
    """A metric that is a sum of work: fitted as such, and taken as known."""

    sized = False

    def __init__(self, scaler: Scaler, table: Table, values: Array, start: Mapping[str, Any]) -> None:
        self.model = WorkModel(scaler, table, values, start.get("work"))
        self.started = {"work": self.model.parameters()}

    def optimistic(self, table: Table, deviations: float) -> Array:
        return np.exp(self.model.predict(table)[0])

    def sample(self, table: Table, count: int, draw: np.random.Generator) -> Array:
        return np.broadcast_to(np.exp(self.model.predict(table)[0]), (count, len(table.dense)))


class Staged(Book):
    """See the module. `known`: metrics that are predicted, not learned; `times`: learned ones that are sums of work."""

    kind = "staged"

    def __init__(
        self, domain: Domain, goal: Goal, seed: int, *, known: Mapping[str, Known] | None = None,
        times: Collection[str] = (), settings: Settings = Settings(), retries: int = 0,
    ) -> None:
        super().__init__(domain, goal, seed)
        self.known, self.times, self.settings, self.retries = dict(known or {}), set(times), settings, retries
        if not set(goal.metrics) - set(self.known):
            raise ValueError("every metric of the goal is predicted; leave out of `known` what the trials are to measure")
        self.encoder = Encoder(domain)
        self._scaler: Scaler | None = None
        self._started: dict[str, dict[str, Any]] = {}
        self._sizes: list[Callable[[Codes, Table], Array]] = []

    # --- the protocol's parts ---

    def _propose(self, n: int, draw: np.random.Generator) -> list[Flat]:
        pool = Pool(self.encoder, draw)
        done = self.done()
        if len(done) < self.settings.initial:
            return [self.encoder.decode(code) for code in self._initial(pool, n)]
        models = self._fit(done)
        chosen = self._batch(pool, models, done, n, draw)
        return [self.encoder.decode(code) for code in chosen]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "started": self._started}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._started = {name: dict(value) for name, value in state["started"].items()}

    # --- before there is a model ---

    def _initial(self, pool: Pool, n: int) -> Codes:
        """Spread over the features, and within the reference where a metric is predicted."""
        codes = pool.random(2000)
        bounds = {**self.goal.objectives, **self.goal.limits}
        for name in set(self.known) & set(bounds):
            within = self._predict(name, codes) <= bounds[name]
            # A tight limit leaves few of them: the fastest are varied until there are some.
            for _ in range(10):
                if within.sum() >= 20 * n:
                    break
                fastest = codes[np.argsort(self._predict(name, codes), kind="stable")[:200]]
                codes = unique(np.vstack([codes, pool.admit(pool.mutate(fastest))]))
                within = self._predict(name, codes) <= bounds[name]
            codes = codes[within] if within.any() else codes
        place = self._standard().dense(self.encoder.table(codes)).numpy()
        asked = self.encoder.encode([trial.config for trial in self.trials])
        taken = self._standard().dense(self.encoder.table(asked)).numpy() if len(asked) else place[:1] * 0
        distance = np.min([np.linalg.norm(place - other, axis=1) for other in taken], axis=0)
        picked = []
        for _ in range(min(n, len(codes))):
            # The farthest of a random handful: spread, yet not only corners.
            handful = pool.draw.permutation(len(codes))[:40]
            best = int(handful[distance[handful].argmax()])
            picked.append(best)
            distance = np.minimum(distance, np.linalg.norm(place - place[best], axis=1))
        return codes[picked]

    def _predict(self, name: str, codes: Codes) -> Array:
        return self.known[name]([self.encoder.decode(code) for code in codes])[0]

    # --- with models ---

    def _standard(self) -> Scaler:
        if self._scaler is None:
            self._scaler = Scaler(self.encoder.table(self._reference()))
        return self._scaler

    def _fit(self, done: Sequence[Trial]) -> dict[str, _Modelled | _Time]:
        """Times first: the other metrics may use them as a measure of size."""
        codes = self.encoder.encode([trial.config for trial in done])
        self._sizes = []
        models: dict[str, _Modelled | _Time] = {}
        for name in (name for name in self.goal.metrics if name in self.known):
            self._sizes.append(partial(self._log_known, name))
        learned = [name for name in self.goal.metrics if name not in self.known]
        for name in sorted(learned, key=lambda name: name not in self.times):
            start = self._started.get(name, {})
            values = np.array([trial.values[name] for trial in done if trial.values is not None])
            if name in self.times and (values > 0).all():
                models[name] = _Time(self._standard(), self.encoder.table(codes), values, start)
                self._sizes.append(partial(self._log_time, models[name]))
            else:
                bound = max(value[name] for value in (self.goal.objectives, self.goal.limits) if name in value)
                models[name] = _Modelled(Scaler(self._table(self._reference())), self._table(codes), done, name, bound, start)
            self._started[name] = models[name].started
        return models

    def _table(self, codes: Codes) -> Table:
        """Features; where the names do not tell a candidate's size the log of its predicted times stands in for it."""
        table = self.encoder.table(codes)
        if self.encoder.knows_size or not self._sizes:
            return table
        columns = np.stack([size(codes, table) for size in self._sizes], axis=1)
        return replace(table, dense=np.hstack([table.dense, columns]), main=np.hstack([table.main, columns]))

    def _log_known(self, name: str, codes: Codes, table: Table) -> Array:
        return np.log(np.maximum(self._predict(name, codes), 1e-12))

    @staticmethod
    def _log_time(model: Any, codes: Codes, table: Table) -> Array:
        return np.log(model.optimistic(table, 0.0))

    def _reference(self) -> Codes:
        """Codes whose features set the scale of all features."""
        return Pool(self.encoder, np.random.default_rng(self.seed)).random(1500)

    def _batch(
        self, pool: Pool, models: Mapping[str, _Modelled | _Time], done: Sequence[Trial], n: int, draw: np.random.Generator
    ) -> Codes:
        settings, goal = self.settings, self.goal
        reference = np.array(list(goal.objectives.values()))
        trials = unique(self.encoder.encode([trial.config for trial in self.trials if trial.status != "failed"]))

        def score(optimism: float, codes: Codes) -> Array:
            tables = self.encoder.table(codes), self._table(codes)
            values = {name: models[name].optimistic(tables[models[name].sized], optimism) if name in models
                      else self._predict(name, codes) for name in goal.metrics}  # fmt: skip
            return _objectives(values, goal)

        size = settings.pool // len(settings.optimism)
        found = unique(np.vstack([
            pool.evolve(partial(score, optimism), unique(np.vstack([pool.random(size), trials])), reference, size=size,
                        generations=settings.generations) for optimism in settings.optimism]))  # fmt: skip
        closed = {code.tobytes() for code in self.encoder.encode([t.config for t in self.trials if t.key in self.closed()])}
        found = found[[code.tobytes() not in closed for code in found]]
        both = np.vstack([trials, found])
        tables, shape = (self.encoder.table(both), self._table(both)), (settings.draws, len(both))
        values = {name: models[name].sample(tables[models[name].sized], settings.draws, draw) if name in models
                  else np.broadcast_to(self._predict(name, both), shape) for name in goal.metrics}  # fmt: skip
        drawn = _objectives(values, goal)
        at = len(trials)
        picked = choose_batch(drawn[:, :at], drawn[:, at:], reference, n, self._chance(found))
        rest = [i for i in draw.permutation(len(found)) if i not in set(picked)]
        return found[[*picked, *rest[: n - len(picked)]]]

    def _chance(self, codes: Codes) -> Array | None:
        """[candidates]: how likely a candidate's trial succeeds, learned from those that failed; None with hardly any."""
        ended = [trial for trial in self.trials if trial.status != "pending"]
        failed = np.array([trial.status == "failed" for trial in ended])
        if failed.sum() < 3:
            return None
        table = self.encoder.table(self.encoder.encode([trial.config for trial in ended]))
        model = Surrogate(self._standard(), table, 1.0 - failed, np.full(len(ended), 0.05))
        return np.clip(model.predict(self.encoder.table(codes))[0], 0.05, 1.0)


def compress(values: Array, bound: float) -> Array:
    """The same up to `bound`, logarithmic beyond: a few disasters would else set the scale of all that is fitted."""
    scale = max((bound - float(values.min())) / 2, 1e-6 * max(abs(bound), 1.0))
    excess = np.maximum(values - bound, 0)
    return np.minimum(values, bound) + scale * np.log1p(excess / scale)


def _objectives(values: Mapping[str, Array], goal: Goal) -> Array:
    """[..., candidates, objectives]; infinite where a limit is broken."""
    stacked = np.stack([values[name] for name in goal.objectives], axis=-1)
    broken = np.zeros(stacked.shape[:-1], dtype=bool)
    for name, limit in goal.limits.items():
        broken |= values[name] > limit
    return np.where(broken[..., None], np.inf, stacked)
