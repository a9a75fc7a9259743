"""Optimizers by name."""

from __future__ import annotations

from typing import Any, Literal, get_args

from search.optim.base import Book, Domain, Goal

Kind = Literal["staged", "botorch", "tpe", "optuna-nsga2", "nsga2", "random"]
KINDS: tuple[str, ...] = get_args(Kind)


def make_optimizer(kind: str, domain: Domain, goal: Goal, seed: int, **options: Any) -> Book:
    """An optimizer; `options` are those of `Staged` and only it takes any. Raises ValueError for an unknown kind."""
    if kind not in KINDS:
        raise ValueError(f"optimizer {kind!r} is unknown; expected one of {', '.join(KINDS)}")
    if kind == "staged":
        from search.optim.staged import Staged

        return Staged(domain, goal, seed, **options)
    if options:
        raise ValueError(f"optimizer {kind!r} takes no option {sorted(options)[0]!r}; only staged does")
    if kind == "botorch":
        from search.optim.plain import PlainBotorch

        return PlainBotorch(domain, goal, seed)
    from search.optim.library import OptunaBook, PymooNSGA2, Random

    if kind == "random":
        return Random(domain, goal, seed)
    return PymooNSGA2(domain, goal, seed) if kind == "nsga2" else OptunaBook(domain, goal, seed, kind=kind)
