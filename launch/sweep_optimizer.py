"""The optimizer that a search's recipe names, made for its space and goal."""

from __future__ import annotations

from functools import partial
from typing import Any

from search.space import Space
from search.sweep import MakeOptimizer, Predict, SweepPlan


def optimizer_maker(kind: str) -> MakeOptimizer:
    """Of that name (search/optim/catalog.py); what is predicted of the device is known to `staged` alone."""

    def make(space: Space, plan: SweepPlan, predict: Predict) -> Any:
        from search.optim.base import Domain, Goal
        from search.optim.catalog import make_optimizer

        options: dict[str, Any] = {}
        if kind == "staged":
            from search.optim.staged import Settings

            known = {name: partial(predict, name) for name in plan.device_limits()}
            options = {"known": known, "settings": Settings(initial=max(4, min(16, plan.trials // 4)))}
        domain = Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible)
        return make_optimizer(kind, domain, Goal(objectives=plan.references, limits=plan.limits), plan.seed, **options)

    return make
