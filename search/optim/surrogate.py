"""Gaussian process with several kernels over one candidate's features, small and quick enough to be refitted at every ask.

k(x, z) = sum over main columns of v_i x_i z_i  +  sum over groups g of v_g <x_g, z_g> / columns_g
          +  v_s Matern52(|(x - z) / lengths|) over the dense columns
The linear parts carry what adds up (sizes, counts, the effect of each slot) from few points; the smooth part carries the rest.
Parameters maximise likelihood times priors (Rasmussen & Williams 2006, eq. 2.30 and 5.8). The Gram matrices of the groups are
computed once, so that a step of the fit is one Cholesky factorisation of [points, points].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from search.optim.encode import Table

Array = NDArray[np.float64]
Parts = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""Standardised dense columns, main columns, groups."""
JITTER = 1e-6
MAIN, MAIN_WIDTH = 0.003, 3.0
"""Prior of a main column's variance: its centre, and the deviation of its log. Wide, for a few of them carry most."""


class Scaler:
    """Standardises tables by the statistics of a reference table, the same for every fit; drops constant columns."""

    def __init__(self, reference: Table) -> None:
        self._dense, self._main = _statistics(reference.dense), _statistics(reference.main)
        self._groups = {name: _statistics(columns) for name, columns in reference.groups.items()}

    def dense(self, table: Table) -> torch.Tensor:
        return _apply(self._dense, table.dense)

    def main(self, table: Table) -> torch.Tensor:
        return _apply(self._main, table.main)

    def groups(self, table: Table) -> dict[str, torch.Tensor]:
        """Each divided by the root of its columns' number: the kernel of a group is 1 on average."""
        scaled = {name: _apply(kept, table.groups[name]) for name, kept in self._groups.items() if len(kept[0])}
        return {name: columns / columns.shape[1] ** 0.5 for name, columns in scaled.items()}


class Surrogate:
    """Fitted to standardised targets on construction."""

    def __init__(
        self, scaler: Scaler, table: Table, targets: Array, variances: Array | None = None,
        start: Mapping[str, Any] | None = None, *, fit: bool = True,
    ) -> None:
        """targets: [points]; variances: [points] of known noise, added to the noise that is learned. start: `parameters()`;
        fit: whether they are fitted anew."""
        self._scaler = scaler
        self._dense, self._main, self._groups = scaler.dense(table), scaler.main(table), scaler.groups(table)
        self._level, self._scale = float(np.mean(targets)), max(float(np.std(targets)), 1e-9)
        self._targets = torch.tensor((targets - self._level) / self._scale)
        known = np.zeros(len(targets)) if variances is None else variances / self._scale**2
        self._known = torch.tensor(known)
        empty = torch.zeros(0, len(targets), len(targets), dtype=torch.float64)
        self._grams = torch.stack([c @ c.T for c in self._groups.values()]) if self._groups else empty
        self._values = self._start() if start is None else self._loaded(start)
        self.evidence = -self._fit() if fit else float("nan")
        """Log of likelihood times priors, of the targets in their own unit."""
        covariance = self._covariance(torch.tensor(self._values))
        self._factor = torch.linalg.cholesky(covariance)
        self._weights = torch.cholesky_solve(self._targets[:, None], self._factor)[:, 0]

    # --- parameters: logs of noise, smooth variance, variance of each group, of each main column, length of each dense one ---

    def parameters(self) -> dict[str, Any]:
        return {"groups": list(self._groups), "values": self._values.tolist()}

    def _start(self) -> Array:
        lengths = np.full(self._dense.shape[1], np.log(4.0 * max(self._dense.shape[1], 1) ** 0.5))
        main = np.full(self._main.shape[1], np.log(MAIN))
        return np.concatenate([[np.log(0.02)], [np.log(0.3)], np.full(len(self._groups), np.log(0.1)), main, lengths])

    def _loaded(self, start: Mapping[str, Any]) -> Array:
        values = np.array(start["values"], dtype=np.float64)
        return values if list(start["groups"]) == list(self._groups) and values.shape == self._start().shape else self._start()

    def _unpack(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        edge = 2 + len(self._groups)
        rest = edge + self._main.shape[1]
        return values[0].exp(), values[1].exp(), values[2:edge].exp(), values[edge:rest].exp(), values[rest:].exp()

    def _log_prior(self, values: torch.Tensor) -> torch.Tensor:
        edge = 2 + len(self._groups)
        centre = torch.tensor(self._start())
        columns = self._main.shape[1]
        width = torch.cat([torch.tensor([1.5, 1.5]), torch.full((len(self._groups),), 1.5), torch.full((columns,), MAIN_WIDTH),
                           torch.full((len(values) - edge - columns,), 0.8)])  # fmt: skip
        return -0.5 * (((values - centre) / width) ** 2).sum()

    def _covariance(self, values: torch.Tensor) -> torch.Tensor:
        noise, smooth, groups, main, lengths = self._unpack(values)
        covariance = smooth * _matern(self._dense / lengths, self._dense / lengths) + (self._main * main) @ self._main.T
        covariance = covariance + (groups[:, None, None] * self._grams).sum(0)
        return covariance + torch.diag(self._known + noise + JITTER)

    def _fit(self) -> float:
        def loss(flat: Array) -> tuple[float, Array]:
            values = torch.tensor(flat, requires_grad=True)
            covariance, prior = self._covariance(values), self._log_prior(values)
            factor, info = torch.linalg.cholesky_ex(covariance.detach())
            if info.item():
                return 1e10, np.zeros_like(flat)
            solved = torch.cholesky_solve(self._targets[:, None], factor)[:, 0]
            likelihood = -0.5 * self._targets @ solved - factor.diagonal().log().sum()
            # The gradient in the covariance in closed form (eq. 5.9): half the time of going back through the factorisation.
            slope = 0.5 * (torch.cholesky_inverse(factor) - torch.outer(solved, solved))
            torch.autograd.backward([covariance, prior], [slope, torch.tensor(-1.0, dtype=prior.dtype)])
            assert values.grad is not None
            return -float(likelihood + prior.detach()), values.grad.numpy()

        bounds = [(start - 6, start + 6) for start in self._start()]
        found = minimize(loss, self._values, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        self._values = found.x
        return float(found.fun) + len(self._targets) * float(np.log(self._scale))

    # --- prediction ---

    def _cross(self, left: Parts, right: Parts) -> torch.Tensor:
        _, smooth, groups, main, lengths = self._unpack(torch.tensor(self._values))
        result = smooth * _matern(left[0] / lengths, right[0] / lengths) + (left[1] * main) @ right[1].T
        for weight, name in zip(groups, self._groups, strict=True):
            result += weight * (left[2][name] @ right[2][name].T)
        return result

    def _parts(self, table: Table) -> Parts:
        return self._scaler.dense(table), self._scaler.main(table), self._scaler.groups(table)

    @property
    def noise_variance(self) -> float:
        """Learned, in the targets' unit squared."""
        return float(np.exp(self._values[0])) * self._scale**2

    def predict(self, table: Table) -> tuple[Array, Array]:
        """Mean and standard deviation [candidates] of the function, without noise."""
        here = self._parts(table)
        cross = self._cross(here, (self._dense, self._main, self._groups))
        half = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        _, smooth, groups, main, _ = self._unpack(torch.tensor(self._values))
        prior = smooth + (main * here[1] ** 2).sum(1)
        prior = prior + sum(weight * (here[2][name] ** 2).sum(1) for weight, name in zip(groups, self._groups, strict=True))
        variance = (prior - (half**2).sum(0)).clamp_min(1e-10)
        return (cross @ self._weights).numpy() * self._scale + self._level, variance.sqrt().numpy() * self._scale

    def sample(self, table: Table, count: int, draw: np.random.Generator) -> Array:
        """[count, candidates] joint draws of the function."""
        here = self._parts(table)
        cross = self._cross(here, (self._dense, self._main, self._groups))
        half = torch.linalg.solve_triangular(self._factor, cross.T, upper=False)
        covariance = self._cross(here, here) - half.T @ half
        factor = _safe_cholesky(covariance)
        normal = torch.tensor(draw.standard_normal((count, len(cross))))
        drawn = (cross @ self._weights)[None, :] + normal @ factor.T
        return drawn.numpy() * self._scale + self._level


def _matern(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Matern 5/2 of unit variance."""
    squared = (left**2).sum(1)[:, None] + (right**2).sum(1)[None, :] - 2 * left @ right.T
    distance = (5 * squared.clamp_min(1e-12)).sqrt()
    return (1 + distance + distance**2 / 3) * (-distance).exp()


def _safe_cholesky(covariance: torch.Tensor) -> torch.Tensor:
    """With as little added to the diagonal as it takes. Raises RuntimeError where nothing helps."""
    for jitter in (1e-6, 1e-5, 1e-4, 1e-3):
        factor, info = torch.linalg.cholesky_ex(covariance + jitter * torch.eye(len(covariance), dtype=covariance.dtype))
        if not info.item():
            return factor
    raise RuntimeError("the covariance of the candidates is no covariance; a feature is not finite")


def _statistics(columns: Array) -> tuple[NDArray[np.intp], Array, Array]:
    kept = np.flatnonzero(columns.std(axis=0) > 1e-9) if columns.shape[1] else np.empty(0, dtype=np.intp)
    return kept, columns[:, kept].mean(axis=0), columns[:, kept].std(axis=0)


def _apply(statistics: tuple[NDArray[np.intp], Array, Array], columns: Array) -> torch.Tensor:
    kept, centre, width = statistics
    return torch.tensor((columns[:, kept] - centre) / width)
