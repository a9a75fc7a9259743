"""A Gaussian process over standardised columns with known noise per point: Matern 5/2, a length scale a column."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


class GaussianProcess:
    """BoTorch's SingleTaskGP with its priors on the length scales. Inputs and answers are numpy, standardised inside."""

    def __init__(self, inputs: Array, targets: Array, variances: Array, state: Mapping[str, Any] | None = None) -> None:
        """inputs: [points, columns]; targets, variances: [points]. Fits, or takes the fitted parameters of `state`."""
        self._columns = np.flatnonzero(inputs.std(axis=0) > 1e-9)
        chosen = inputs[:, self._columns]
        self._centre, self._width = chosen.mean(axis=0), chosen.std(axis=0)
        self._level, self._scale = float(targets.mean()), max(float(targets.std()), 1e-9)
        self._inputs, self._targets, self._variances = inputs, targets, variances
        self._model = self._build()
        if state is None:
            self._fit()
        else:
            self._model.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()})
        self._model.eval()

    def _build(self) -> Any:
        from botorch.models import SingleTaskGP
        from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
        from gpytorch.kernels import ScaleKernel
        from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
        from gpytorch.priors import GammaPrior

        kernel = get_covar_module_with_dim_scaled_prior(ard_num_dims=max(len(self._columns), 1), use_rbf_kernel=False)
        noise = torch.tensor(np.maximum(self._variances / self._scale**2, 1e-6), dtype=torch.float64)
        # What differs from one session to the next is not in the error of a median: learned on top.
        likelihood = FixedNoiseGaussianLikelihood(noise=noise, learn_additional_noise=True)
        targets = torch.tensor((self._targets - self._level) / self._scale, dtype=torch.float64)[:, None]
        return SingleTaskGP(
            self._standardise(self._inputs), targets, likelihood=likelihood, outcome_transform=None,
            covar_module=ScaleKernel(kernel, outputscale_prior=GammaPrior(2.0, 0.15)),
        ).double()  # fmt: skip

    def _fit(self) -> None:
        from botorch.fit import fit_gpytorch_mll
        from gpytorch.mlls import ExactMarginalLogLikelihood

        mll = ExactMarginalLogLikelihood(self._model.likelihood, self._model)
        fit_gpytorch_mll(mll, optimizer_kwargs={"options": {"maxiter": 75}})

    def _standardise(self, inputs: Array) -> torch.Tensor:
        if not len(self._columns):  # a constant function: one dead column
            return torch.zeros(len(inputs), 1, dtype=torch.float64)
        return torch.tensor((inputs[:, self._columns] - self._centre) / self._width, dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """Fitted parameters as plain lists."""
        return {name: value.tolist() for name, value in self._model.state_dict().items()}

    def parameters_for(self, inputs: Array, targets: Array, variances: Array) -> GaussianProcess:
        """The same fitted parameters given other points, without fitting anew: for cross-validation."""
        return GaussianProcess(inputs, targets, variances, self.state())

    @property
    def extra_noise(self) -> float:
        """Variance of a reading around the function, beyond its known error: what differs from one session to the next."""
        return float(self._model.likelihood.second_noise.item()) * self._scale**2

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the function, without the noise of a reading: [points] each."""
        mean, covariance = self.joint(inputs, diagonal=True)
        return mean, np.sqrt(np.maximum(covariance, 1e-12))

    def joint(self, inputs: Array, *, diagonal: bool = False) -> tuple[Array, Array]:
        """Mean [points] and covariance [points, points] (`diagonal`: [points])."""
        with torch.no_grad():
            posterior = self._model(self._standardise(inputs))
            second = posterior.variance if diagonal else posterior.covariance_matrix
            mean = posterior.mean.numpy() * self._scale + self._level
            return mean, second.numpy() * self._scale**2
