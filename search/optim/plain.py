"""BoTorch as it comes: one Gaussian process an objective over the encoded candidate, qLogNEHVI, a discrete pool.

No knowledge of what the names mean, no stage: the yardstick for `staged`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from search.optim.base import Book, Domain, Flat, Goal
from search.optim.encode import Codes, Encoder
from search.optim.pool import Pool, unique


class PlainBotorch(Book):
    """qLogNEHVI (Ament et al. 2023) with limits as outcome constraints."""

    kind = "botorch"
    initial = 16
    pool = 384

    def __init__(self, domain: Domain, goal: Goal, seed: int) -> None:
        super().__init__(domain, goal, seed)
        self.encoder = Encoder(domain)

    def _propose(self, n: int, draw: np.random.Generator) -> list[Flat]:
        pool = Pool(self.encoder, draw)
        done = self.done()
        if len(done) < self.initial:
            return [self.encoder.decode(code) for code in pool.random(4 * n)]
        best = self.encoder.encode([trial.config for trial in done[-64:]])
        closed = {code.tobytes() for code in self.encoder.encode([t.config for t in self.trials if t.key in self.closed()])}
        codes = unique(np.vstack([pool.random(self.pool // 2), pool.admit(pool.mutate(np.repeat(best, 4, axis=0)))]))
        codes = codes[[code.tobytes() not in closed for code in codes]]
        codes = codes[draw.permutation(len(codes))[: self.pool]]
        return [self.encoder.decode(code) for code in codes[self._best(codes, n, draw)]]

    def _best(self, codes: Codes, n: int, draw: np.random.Generator) -> list[int]:
        import torch
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
        from botorch.optim import optimize_acqf_discrete
        from botorch.sampling.normal import SobolQMCNormalSampler

        torch.manual_seed(int(draw.integers(2**31)))
        done, names = self.done(), self.goal.metrics
        count = len(self.goal.objectives)
        known = self._inputs(self.encoder.encode([trial.config for trial in done]))
        model = self._fit(known)
        reference = -torch.tensor(list(self.goal.objectives.values()), dtype=torch.float64)
        limits = [(names.index(name), limit) for name, limit in self.goal.limits.items()]
        pending = [trial for trial in self.trials if trial.status == "pending"]
        acquisition = qLogNoisyExpectedHypervolumeImprovement(
            model, reference, known, sampler=SobolQMCNormalSampler(torch.Size([32]), seed=int(draw.integers(2**31))),
            objective=GenericMCMultiOutputObjective(lambda values, X: -values[..., :count]), prune_baseline=True,
            constraints=[partial(_excess, at, limit) for at, limit in limits] or None,
            X_pending=self._inputs(self.encoder.encode([t.config for t in pending])) if pending else None,
        )  # fmt: skip
        choices = self._inputs(codes)
        picked, _ = optimize_acqf_discrete(acquisition, q=min(n, len(codes)), choices=choices, unique=True)
        return [int((choices - row).abs().sum(1).argmin()) for row in picked]

    def _inputs(self, codes: Codes) -> Any:
        """[candidates, columns] from 0 to 1: sizes by position, kinds one-hot."""
        import torch

        numeric = self.encoder.numeric
        parts = [codes[:, [i]] / max(self.encoder.sizes[i] - 1, 1) for i in numeric]
        parts += [np.eye(self.encoder.sizes[i])[codes[:, i]] for i in range(len(self.encoder.sizes)) if i not in numeric]
        return torch.tensor(np.hstack(parts), dtype=torch.float64)

    def _fit(self, inputs: Any) -> Any:
        import torch
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from botorch.models.transforms import Standardize
        from gpytorch.mlls import ExactMarginalLogLikelihood

        models = []
        for name in self.goal.metrics:
            values = torch.tensor([[trial.values[name]] for trial in self.done() if trial.values], dtype=torch.float64)
            model = SingleTaskGP(inputs, values, outcome_transform=Standardize(1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs={"options": {"maxiter": 50}})
            models.append(model)
        return ModelListGP(*models)


def _excess(at: int, limit: float, values: Any) -> Any:
    """Above 0 where the limit is broken."""
    return values[..., at] - limit
