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
from scipy.stats import norm

from search.optim.base import Book, Domain, Flat, Goal, Trial
from search.optim.encode import Codes, Encoder, Table
from search.optim.hypervolume import choose_batch
from search.optim.latency_stage import LatencyStage
from search.optim.metrics import Modelled, Time
from search.optim.pool import Pool, unique
from search.optim.probes import choose_probes
from search.optim.surrogate import Scaler, Surrogate
from search.optim.work import are_times

Array = NDArray[np.float64]
FEWEST = 4
"""Answers for a model where most evaluations fail."""
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
    probes: bool = True
    """Whether a share of each batch goes to values that were hardly tried (`search.optim.probes`)."""


class Staged(Book):
    """See the module. `known`: metrics that are predicted, not learned; `times`: learned ones that are sums of work."""

    kind = "staged"

    def __init__(
        self, domain: Domain, goal: Goal, seed: int, *, known: Mapping[str, Known] | None = None,
        times: Collection[str] = (), settings: Settings = Settings(), retries: int = 0, repeats: bool = False,
    ) -> None:
        super().__init__(domain, goal, seed)
        self.known, self.times, self.settings = dict(known or {}), set(times), settings
        self.retries, self.repeats = retries, repeats
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
        ended = sum(trial.status != "pending" for trial in self.trials)
        # Where most evaluations fail a few answers have to do: the start knows nothing of what makes them fail.
        if len(done) < (self.settings.initial if ended < 2 * self.settings.initial else FEWEST):
            return [self.encoder.decode(code) for code in self._initial(pool, n)]
        models = self._fit(done)
        chosen = self._batch(pool, models, n, draw)
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
        chance = self._chance(codes)
        chance = np.ones(len(codes)) if chance is None else chance
        picked = []
        for _ in range(min(n, len(codes))):
            # The farthest of a random handful: spread, yet not only corners.
            handful = pool.draw.permutation(len(codes))[:40]
            best = int(handful[(distance * chance)[handful].argmax()])
            picked.append(best)
            distance = np.minimum(distance, np.linalg.norm(place - place[best], axis=1))
        return codes[picked]

    def _predict(self, name: str, codes: Codes, table: Table | None = None) -> Array:
        known = self.known[name]
        if isinstance(known, LatencyStage):
            return known.of_table(self.encoder.table(codes) if table is None else table)[0]
        return known([self.encoder.decode(code) for code in codes])[0]

    # --- with models ---

    def _standard(self) -> Scaler:
        if self._scaler is None:
            self._scaler = Scaler(self.encoder.table(self._reference()))
        return self._scaler

    def _fit(self, done: Sequence[Trial]) -> dict[str, Modelled | Time]:
        """Times first: the other metrics may use them as a measure of size."""
        codes = self.encoder.encode([trial.config for trial in done])
        self._sizes = []
        models: dict[str, Modelled | Time] = {}
        for name in (name for name in self.goal.metrics if name in self.known):
            self._sizes.append(partial(self._log_known, name))
        learned = [name for name in self.goal.metrics if name not in self.known]
        for name in sorted(learned, key=lambda name: name not in self.times):
            start = self._started.get(name, {})
            values = np.array([trial.values[name] for trial in done if trial.values is not None])
            if name in self.times and are_times(values):
                models[name] = Time(self._standard(), self.encoder.table(codes), values, start)
                self._sizes.append(partial(self._log_time, models[name]))
            else:
                bound = max(value[name] for value in (self.goal.objectives, self.goal.limits) if name in value)
                models[name] = Modelled(Scaler(self._table(self._reference())), self._table(codes), done, name, bound, start)
            self._started[name] = models[name].started
        return models

    def _table(self, codes: Codes, table: Table | None = None) -> Table:
        """Features; where the names do not tell a candidate's size the log of its predicted times stands in for it."""
        table = self.encoder.table(codes) if table is None else table
        if self.encoder.knows_size or not self._sizes:
            return table
        columns = np.stack([size(codes, table) for size in self._sizes], axis=1)
        return replace(table, dense=np.hstack([table.dense, columns]), main=np.hstack([table.main, columns]))

    def _log_known(self, name: str, codes: Codes, table: Table) -> Array:
        return np.log(np.maximum(self._predict(name, codes, table), 1e-12))

    @staticmethod
    def _log_time(model: Any, codes: Codes, table: Table) -> Array:
        return np.log(model.optimistic(table, 0.0))

    def _reference(self) -> Codes:
        """Codes whose features set the scale of all features."""
        return Pool(self.encoder, np.random.default_rng(self.seed)).random(1500)

    def _batch(
        self, pool: Pool, models: Mapping[str, Modelled | Time], n: int, draw: np.random.Generator
    ) -> Codes:
        """Up to `n` codes: probes, then what is expected to add most to the trials and to them."""
        settings, reference = self.settings, np.array(list(self.goal.objectives.values()))
        trials = unique(self.encoder.encode([trial.config for trial in self.trials if trial.status != "failed"]))
        closed = {code.tobytes() for code in self.encoder.encode([t.config for t in self.trials if t.key in self.closed()])}

        def score(optimism: float, codes: Codes) -> Array:
            table = self.encoder.table(codes)
            tables = table, self._table(codes, table)
            return self._objectives({
                name: models[name].optimistic(tables[models[name].sized], optimism) if name in models
                else self._predict(name, codes, table) for name in self.goal.metrics})  # fmt: skip

        size = settings.pool // len(settings.optimism)
        found = unique(np.vstack([
            pool.evolve(partial(score, optimism), unique(np.vstack([pool.random(size), trials])), reference, size=size,
                        generations=settings.generations) for optimism in settings.optimism]))  # fmt: skip
        probes = trials[:0]
        if settings.probes:
            asked = self.encoder.encode([trial.config for trial in self.trials[settings.initial :]])
            probes = choose_probes(pool, score, trials, asked, closed, reference, n, self._chance)
        closed |= {code.tobytes() for code in probes}
        found = found[[code.tobytes() not in closed for code in found]]
        if len(probes) >= n or not len(found):
            return probes[:n]
        return np.vstack([probes, self._expected_best(models, np.vstack([trials, probes]), found, n - len(probes), draw)])

    def _expected_best(
        self, models: Mapping[str, Modelled | Time], trials: Codes, found: Codes, n: int, draw: np.random.Generator
    ) -> Codes:
        """`n` of `found` by what they add to `trials`, on average over joint draws."""
        both, reference = np.vstack([trials, found]), np.array(list(self.goal.objectives.values()))
        tables, shape = (self.encoder.table(both), self._table(both)), (self.settings.draws, len(both))
        drawn = self._objectives({
            name: models[name].sample(tables[models[name].sized], shape[0], draw) if name in models
            else np.broadcast_to(self._predict(name, both), shape) for name in self.goal.metrics})  # fmt: skip
        mine, theirs = drawn[:, : len(trials)], drawn[:, len(trials) :]
        chance = self._chance(found)
        picked = choose_batch(mine, theirs, reference, n, chance)
        if len(picked) < n:  # nothing more is expected to help: what comes nearest to the reference
            excess = np.maximum(np.nan_to_num(theirs, posinf=1e6) - reference, 0) / (np.abs(reference) + 1e-12)
            shuffled = draw.permutation(len(found))
            cost = (1 + excess.sum(axis=2).mean(axis=0)) / (1.0 if chance is None else chance)
            nearest = shuffled[np.argsort(cost[shuffled], kind="stable")]
            picked += [i for i in nearest if i not in set(picked)][: n - len(picked)]
        return found[picked]

    def _chance(self, codes: Codes) -> Array | None:
        """[candidates]: how likely a candidate's trial succeeds, learned from those that failed; None with hardly any."""
        ended = [trial for trial in self.trials if trial.status != "pending"]
        failed = np.array([trial.status == "failed" for trial in ended])
        if failed.sum() < 3:
            return None
        table = self.encoder.table(self.encoder.encode([trial.config for trial in ended]))
        # Least squares on labels, read out as a probit: success is a sum above 0 of what is known, unknown and left to chance.
        model = Surrogate(self._standard(), table, np.where(failed, -1.0, 1.0))
        mean, deviation = model.predict(self.encoder.table(codes))
        return np.maximum(norm.cdf(mean / np.sqrt(deviation**2 + model.noise_variance)), 1e-4)

    def _objectives(self, values: Mapping[str, Array]) -> Array:
        """[..., candidates, objectives]; infinite where a limit is broken."""
        stacked = np.stack([values[name] for name in self.goal.objectives], axis=-1)
        broken = np.zeros(stacked.shape[:-1], dtype=bool)
        for name, limit in self.goal.limits.items():
            broken |= values[name] > limit
        return np.where(broken[..., None], np.inf, stacked)
