"""Two budgets: a short training for every trial, the full one only where the short one leaves a chance of a better front.

While it is not known whether short scores rank as full ones do (`search.quality.RankAgreement`), a trial is scored at both.
After that its full loss is predicted from the short one, by the line through all trials that have both, with the spread of a
new point; the full training follows where that promises the front enough: the hypervolume that it would gain, on average
over the spread. A trial that ends without one has a `predicted_loss` and no `loss`: it is never on a front, and the optimizer
is told the prediction with its spread as noise.

Everything is taken from the answers that the optimizer had when it asked for the trial. So a service that was killed decides
the same again, and in an ordered search it does not matter which of a round's trials ends first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from search.quality import RankAgreement
from search.records import Results, Trial
from search.store import Store

QUANTILES = 64
"""Of the predicted loss, over which a gain is averaged."""


@dataclass(frozen=True)
class Relation:
    """Full loss as a line of the short one: least squares, with the deviation of a new point around it."""

    slope: float
    short: float
    """Mean of the short losses; the line goes through it and `full`."""
    full: float
    spread: float
    """Standard deviation around the line, two degrees of freedom taken off."""
    scatter: float
    """Sum of squares of the short losses around their mean."""
    count: int

    @classmethod
    def fit(cls, pairs: Sequence[tuple[float, float]]) -> Relation:
        """Of (short, full). Raises ValueError for fewer than three pairs, or equal short losses."""
        x, y = np.asarray(pairs, dtype=np.float64).reshape(-1, 2).T
        scatter = float(((x - x.mean()) ** 2).sum()) if len(x) else 0.0
        if len(x) < 3 or scatter == 0:
            raise ValueError(f"{len(x)} pairs of losses give no line; expected three or more with different short losses")
        slope = float(((x - x.mean()) * (y - y.mean())).sum()) / scatter
        left = y - y.mean() - slope * (x - x.mean())
        return cls(slope, float(x.mean()), float(y.mean()), math.sqrt(float((left**2).sum()) / (len(x) - 2)), scatter, len(x))

    def predict(self, short: float) -> tuple[float, float]:
        """Full loss and its standard deviation, for a candidate that is not among the pairs."""
        off = short - self.short
        return self.full + self.slope * off, self.spread * math.sqrt(1 + 1 / self.count + off**2 / self.scatter)


@dataclass(frozen=True)
class Verdict:
    """Whether a trial is worth its full training."""

    loss: float
    """Predicted."""
    deviation: float
    gain: float
    """Of hypervolume, on average, as a share of what the front has; of what the references span while there is no front."""
    full: bool


class TwoBudgets:
    """The rule of the module, for the trials of one database."""

    def __init__(
        self, store: Store, short_tokens: int, references: Results, limits: Results | None = None, *, least: int = 20,
        bar: float = 0.7, worth: float = 2e-4,
    ) -> None:  # fmt: skip
        """references: of every objective, `loss` among them. least, bar: pairs and Kendall's tau from which on short scores
        are believed. worth: the smallest gain, as a share, for which a full training is spent."""
        self.store, self.short_tokens, self.references, self.limits = store, short_tokens, references, limits or {}
        self.least, self.bar, self.worth = least, bar, worth

    def scorings(self, trial: Trial) -> dict[str, Mapping[str, Any]]:
        """By name, what scorers are asked for when the trial begins."""
        candidate = trial.config["candidate"]
        short: dict[str, Mapping[str, Any]] = {"short": {**candidate, "budget_tokens": self.short_tokens}}
        return short if self.agreement(trial).usable else {**short, "score": candidate}

    def agreement(self, trial: Trial | None = None) -> RankAgreement:
        """Of short and full losses, as known when the trial was asked for; of all there are without one."""
        pairs = {other.key: (found["short_loss"], found["loss"]) for other in self._known(trial)
                 if (found := other.results or {}).keys() >= {"short_loss", "loss"}}  # fmt: skip
        return RankAgreement(self.least, self.bar, pairs)

    def scores(self, trial: Trial, short: Results, full: Results | None) -> tuple[dict[str, float], dict[str, float]]:
        """A trial's scores and their deviations, from what its scorings brought."""
        if full is not None:
            return {**full, "short_loss": short["loss"]}, {}
        loss, deviation = self._relation(trial).predict(short["loss"])
        rest = {name: value for name, value in short.items() if name != "loss"}
        return {**rest, "short_loss": short["loss"], "predicted_loss": loss}, {"predicted_loss": deviation}

    def judge(self, trial: Trial, short: Results, measured: Results) -> Verdict:
        """Of a trial that has its short score and its measurements."""
        loss, deviation = self._relation(trial).predict(short["loss"])
        gain = self._gain(trial, NormalDist(loss, max(deviation, 1e-12)), measured)
        return Verdict(loss, deviation, gain, gain > self.worth)

    def _gain(self, trial: Trial, loss: NormalDist, measured: Results) -> float:
        """Over the fully trained trials that it knew of; 0 for a trial that breaks a limit."""
        from search.optim.hypervolume import hypervolume, improvements

        names, reference = list(self.references), np.array(list(self.references.values()))
        if any(measured.get(name, math.inf) > limit for name, limit in self.limits.items() if name != "loss"):
            return 0.0
        known = [found for other in self._known(trial) if "loss" in (found := other.results or {})]
        useful = [[found[name] for name in names] for found in known if self._within(found)]
        base = np.array(useful, dtype=np.float64).reshape(len(useful), len(names))
        points = np.array([[[{**measured, "loss": value}[name] for name in names]] for value in _quantiles(loss)])
        gains = improvements(np.broadcast_to(base, (QUANTILES, *base.shape)), points, reference)[:, 0]
        allowed = points[:, 0, names.index("loss")] <= self.limits.get("loss", math.inf)
        has = (hypervolume(base, reference) if useful else 0.0) or float(np.prod(np.abs(reference)))
        return float((gains * allowed).mean()) / has

    def _within(self, found: Results) -> bool:
        bounds = (*self.references.items(), *self.limits.items())
        return all(found.get(name, math.inf) <= bound for name, bound in bounds)

    def _relation(self, trial: Trial) -> Relation:
        return Relation.fit(list(self.agreement(trial).pairs.values()))

    def _known(self, trial: Trial | None) -> list[Trial]:
        told = self.store.told()
        return told if trial is None else told[: trial.config["told"]]


def _quantiles(loss: NormalDist) -> list[float]:
    """The middles of as many equally likely parts."""
    return [loss.inv_cdf((i + 0.5) / QUANTILES) for i in range(QUANTILES)]


def answer_of(results: Results | None, noise: Results) -> tuple[Results | None, Results]:
    """A trial's results and noise as an optimizer is told of them: a predicted loss stands for one that is not there."""
    if results is None or "loss" in results or "predicted_loss" not in results:
        return results, noise
    return {**results, "loss": results["predicted_loss"]}, {**noise, "loss": noise["predicted_loss"]}
