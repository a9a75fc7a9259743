"""Fit the scaling law to runs: Huber's loss on log L, L-BFGS from a grid of starts, a bootstrap for what is sure.

As Chinchilla's third approach (arXiv 2203.15556, section 3.3), for the law with experts. Runs of one x carry the common
constants; those of every other x are fitted on their own with the constants pulled towards the common ones, c most of all,
as MobileMoE does (arXiv 2605.27358). Needs SciPy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.scaling_files import Run
from search.scaling_law import BILLION, Array, Choice, Constants, LawError, Part, ScalingLaw, effective_experts

HUBER = 1e-3
"""Residual of log L from which an error counts linearly, as in Chinchilla; also the scale of the prior's bargain."""
OF_EXPERTS = (1, 3, 5, 7)
"""Places of delta, gamma, omega, zeta in a vector of constants: without several E they are not fitted."""
LEAST_WITH_PRIOR = 4
FINALISTS = 4
STEPS_OF_A_DRAW = 400


@dataclass(frozen=True)
class Prior:
    """Constants that a fit is pulled towards: a normal distribution of each, A, B and c in their logarithms."""

    constants: Constants
    widths: tuple[float, ...]
    """Standard deviation of each of the nine."""


def published_prior(constants: Constants) -> Prior:
    """Loose about what another tokenizer, text or range of sizes changes, less so about exponents."""
    return Prior(constants, (1.0, 0.3, 0.15, 0.1, 1.0, 0.5, 0.15, 0.15, 0.5))


def weak_prior(runs: Sequence[Run]) -> Prior:
    """What a few runs of any size need so that no term runs away: exponents of the order that all published laws have, a
    floor of about half the least loss, and experts that change little."""
    floor = 0.5 * min((run.loss for run in runs), default=1.0)
    constants = Constants(A=1.0, delta=0.0, alpha=-0.3, gamma=0.0, B=1.0, omega=0.0, beta=-0.3, zeta=0.0, c=floor)
    return Prior(constants, (5.0, 1.0, 0.2, 0.1, 5.0, 1.0, 0.2, 0.1, 0.7))


def common_prior(constants: Constants) -> Prior:
    """For one x: its capacity and data terms may differ, the loss that nothing goes below hardly."""
    return Prior(constants, (0.5, 0.2, 0.05, 0.05, 0.5, 0.2, 0.05, 0.05, 0.01))


def fit(
    runs: Sequence[Run], *, prior: Prior | None = None, bootstraps: int = 200, seed: int = 0, with_embedding: bool = True,
    provenance: str = "",
) -> ScalingLaw:  # fmt: skip
    """The law of these runs.

    Dense runs alone give Chinchilla's law. Runs of several x: the one with most E has the common constants, together with
    the dense runs, and the others get constants of their own. bootstraps: draws of the constants; 0 for no intervals.
    Raises LawError for too few runs, or runs that leave constants open (all of one size, say) and no prior to fill them.
    """
    import scipy.optimize  # noqa: F401  before the limit, which holds for what is loaded
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # matrices of nine columns: several threads would only wait for each other
        common, parts = _fit_all(runs, prior, bootstraps, np.random.default_rng(seed), with_embedding)
    said = provenance or f"fitted to {len(runs)} runs" + (", with a prior" if prior else "")
    return ScalingLaw(common=common, parts=parts, provenance=said, counts_embedding=with_embedding)


def _fit_all(
    runs: Sequence[Run], prior: Prior | None, bootstraps: int, draw: np.random.Generator, embedding: bool
) -> tuple[Part, dict[Choice, Part]]:
    choices = sorted({run.choice for run in runs if run.choice is not None})
    dense = [run for run in runs if run.choice is None]
    groups = {choice: dense + [run for run in runs if run.choice == choice] for choice in choices}
    main = max(groups, key=lambda choice: (len({run.experts for run in groups[choice]}), len(groups[choice])), default=None)
    common = _fit_part(dense if main is None else groups[main], prior, bootstraps, draw, embedding)
    pull = common_prior(common.constants)
    parts = {choice: common if choice == main else _fit_part(groups[choice], pull, bootstraps, draw, embedding)
             for choice in choices}  # fmt: skip
    return common, parts


def _fit_part(runs: Sequence[Run], prior: Prior | None, bootstraps: int, draw: np.random.Generator, embedding: bool) -> Part:
    problem = _Problem(runs, prior, embedding)
    theta = problem.best()
    left = problem.residuals(theta)
    spare = max(len(runs) - problem.used(theta), 1.0)
    # Weights of the Bayesian bootstrap (Rubin 1981): unlike runs drawn again, they never lose a level of E or N. They vary
    # by more than its 1, by as much as fitting took off the residuals (the factor HC1 of MacKinnon and White 1985).
    weights = draw.dirichlet(np.full(len(runs), spare / len(runs)), bootstraps) * len(runs)
    moves = problem.alike(theta)
    # What only the prior tells varies as the prior does: its middle is drawn, too.
    widths = np.array(prior.widths) if prior else np.zeros(9)
    bases = problem.base + widths * draw.normal(size=(bootstraps, 9))
    draws = [problem.solve(theta, moves, row, STEPS_OF_A_DRAW, base) for row, base in zip(weights, bases, strict=True)]
    losses = np.array([run.loss for run in runs])
    sizes = [run.size(embedding) / BILLION for run in runs]
    tokens, experts = [run.tokens / BILLION for run in runs], [run.experts for run in runs]
    return Part(
        constants=Constants.from_vector(theta), draws=tuple(Constants.from_vector(x) for x in draws), runs=len(runs),
        active=(min(sizes), max(sizes)), tokens=(min(tokens), max(tokens)), experts=(min(experts), max(experts)),
        rmse=float(np.sqrt(np.mean((losses - losses * np.exp(left)) ** 2))),
        noise=float(np.sqrt((left**2).sum() / spare)),
    )  # fmt: skip


class _Problem:
    """The objective over the constants that these runs can tell, and its minimum.

    `theta` are the nine of `Constants.vector`. They are moved along the orthogonal columns of the runs' features: exponents
    and factors trade off against each other so closely that L-BFGS creeps along them otherwise.
    """

    def __init__(self, runs: Sequence[Run], prior: Prior | None, embedding: bool) -> None:
        several = len({run.experts for run in runs}) > 1
        self.free = [i for i in range(9) if prior is not None or several or i not in OF_EXPERTS]
        self._check_count(len(runs), prior)
        n = np.log([run.size(embedding) / BILLION for run in runs])
        d = np.log([run.tokens / BILLION for run in runs])
        e = np.log(effective_experts([run.experts for run in runs]))
        one = np.ones(len(runs))
        self.target = np.log([run.loss for run in runs])
        self.capacity, self.data = np.stack([one, e, n, e * n]), np.stack([one, e, d, e * d])
        self.even = one
        self.base = prior.constants.vector() if prior else np.zeros(9)
        self.pull = np.array([0.0 if prior is None else HUBER / width for width in prior.widths]) if prior else np.zeros(9)
        self.several = several
        self.moves = self._moves(prior is not None)

    def _check_count(self, count: int, prior: Prior | None) -> None:
        least = len(self.free) + 1 if prior is None else LEAST_WITH_PRIOR
        if count < least:
            more = ", or give a prior" if prior is None else ""
            raise LawError(f"{count} runs are too few for {len(self.free)} constants; expected at least {least}{more}")

    def _moves(self, has_prior: bool) -> Array:
        """[9, free]: directions along which the predictions change alike."""
        moves = np.zeros((9, len(self.free)))
        column = 0
        for offset, features, what in ((0, self.capacity, "active parameters"), (4, self.data, "tokens")):
            places = [i for i in range(offset, offset + 4) if i in self.free]
            rows = features[[i - offset for i in places]].T
            if has_prior:
                rows = np.concatenate([rows, np.diag(self.pull[places])])
            if np.linalg.matrix_rank(rows, tol=1e-6 * math.sqrt(len(rows))) < len(places):
                each = " for each of the E" if self.several else ""
                raise LawError(f"the runs leave the exponents of {what} open: too few different {what}{each}; train more "
                               "sizes, or give a prior")
            triangle = np.linalg.qr(rows / math.sqrt(len(self.target)), mode="r")
            moves[np.ix_(places, range(column, column + len(places)))] = np.linalg.inv(triangle)
            column += len(places)
        moves[8, column] = 1.0
        return moves

    def residuals(self, theta: Array) -> Array:
        """Predicted less measured log loss."""
        return self._terms(theta)[1] - self.target

    def _terms(self, theta: Array) -> tuple[Array, Array]:
        """Shares of the three terms [3, runs], and the log loss."""
        logs = np.stack([theta[:4] @ self.capacity, theta[4:8] @ self.data, np.full(len(self.target), theta[8])])
        top = logs.max(axis=0)
        parts = np.exp(logs - top)
        total = parts.sum(axis=0)
        return parts / total, top + np.log(total)

    def _slopes(self, shares: Array) -> Array:
        """[9, runs]: of the log loss by each constant."""
        return np.concatenate([shares[0] * self.capacity, shares[1] * self.data, shares[2:]])

    def objective(
        self, theta: Array, weights: Array | None = None, base: Array | None = None
    ) -> tuple[float, Array]:
        """Huber's loss over HUBER^2, as a likelihood is, plus the prior's half squares; and its gradient."""
        weights = self.even if weights is None else weights
        shares, predicted = self._terms(theta)
        left = predicted - self.target
        inner = np.clip(left, -HUBER, HUBER)
        off = self.pull * (theta - (self.base if base is None else base))
        value = (weights * inner * (left - inner / 2)).sum() + (off**2).sum() / 2
        gradient = self._slopes(shares) @ (weights * inner) + self.pull * off
        return float(value) / HUBER**2, gradient / HUBER**2

    def best(self) -> Array:
        """The minimum over all starts: a short way from each, the most promising to the end."""
        tried = [self.solve(start, self.moves, self.even, 60) for start in self.starts()]
        tried.sort(key=lambda theta: self.objective(theta)[0])
        ends = [self.solve(theta, self.alike(theta), self.even) for theta in tried[:FINALISTS]]
        return min(ends, key=lambda theta: self.objective(theta)[0])

    def alike(self, theta: Array) -> Array:
        """[9, free]: directions that change the predictions equally much near `theta`."""
        slopes = self._slopes(self._terms(theta)[0])[self.free]
        values, vectors = np.linalg.eigh(slopes @ slopes.T + np.diag(self.pull[self.free] ** 2))
        moves = np.zeros((9, len(self.free)))
        moves[self.free] = vectors / np.sqrt(np.maximum(values, 1e-9 * values[-1]))
        return moves

    def solve(
        self, start: Array, moves: Array, weights: Array, steps: int = 3000, base: Array | None = None
    ) -> Array:
        """The minimum that L-BFGS finds from there, along `moves`."""
        from scipy.optimize import minimize

        def along(x: Array) -> tuple[float, Array]:
            value, gradient = self.objective(start + moves @ x, weights, base)
            return value, moves.T @ gradient

        with np.errstate(over="ignore", invalid="ignore"):
            options = {"maxiter": steps, "maxfun": 2 * steps, "ftol": 1e-11, "gtol": 1e-5, "maxcor": 20}
            found = minimize(along, np.zeros(moves.shape[1]), jac=True, method="L-BFGS-B", options=options)
        theta = start + moves @ found.x
        return theta if np.isfinite(theta).all() else start

    def starts(self) -> list[Array]:
        """c as shares of the least loss, two exponents a term, and how the rest is split between the terms at the mean run.

        Experts change nothing at first, unless the prior says how."""
        low, mean = math.exp(self.target.min()), math.exp(self.target.mean())
        centre_n, centre_d = self.capacity[2].mean(), self.data[2].mean()
        grid = itertools.product((0.3, 0.6, 0.9), (-0.15, -0.4), (-0.15, -0.4), (0.2, 0.5, 0.8))
        found = [self.base.copy()] if self.pull.any() else []
        for share, alpha, beta, split in grid:
            theta = np.where(self.pull > 0, self.base, 0.0)
            rest = mean - share * low
            theta[[2, 6, 8]] = alpha, beta, math.log(share * low)
            theta[0], theta[4] = math.log(split * rest) - alpha * centre_n, math.log((1 - split) * rest) - beta * centre_d
            found.append(theta)
        return found

    def used(self, theta: Array) -> float:
        """Degrees of freedom that the fit took: all constants, less what the prior holds."""
        slopes = self._slopes(self._terms(theta)[0])[self.free]
        information = slopes @ slopes.T
        return float(np.trace(np.linalg.pinv(information + np.diag(self.pull[self.free] ** 2)) @ information))


