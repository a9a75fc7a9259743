"""What a candidate is worth: scorers behind one protocol, and when a cheap score may stand for an expensive one.

Training is not spoken of here: `TrainedScorer` is given a function (`launch/search_quality.py` makes one that prunes a
backbone, inherits its weights and trains briefly). The other two scorers are for benchmarks and tests.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from modeling.config import ModelConfig
from modeling.identity import config_key
from search.workers import Infeasible, Score

Status = Literal["ok", "infeasible", "failed"]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The outcome of one scoring. A number is there only where it was measured: failures never become fake losses."""

    status: Status
    """`infeasible`: the candidate itself cannot be had (it diverged, the backbone does not cover it); asking again gives
    the same. `failed`: something else went wrong; asking again may help."""
    loss: float | None = None
    """Held out, smaller is better, in `metric`; None unless `ok`."""
    metric: str = "loss"
    """`loss` in nats a token, or `bits_per_byte`."""
    tokens: int = 0
    """Trained on for this score."""
    seconds: float = 0.0
    start_loss: float | None = None
    """The same metric before training: right after pruning."""
    reason: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") != (self.loss is not None and math.isfinite(self.loss)):
            raise ValueError(f"quality is {self.status!r} with loss {self.loss}; expected a finite loss exactly where ok")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Quality:
        """Raises ValueError for what is no quality of ours."""
        try:
            return cls(**document)
        except TypeError as error:
            raise ValueError(f"not the record of a quality ({error})") from None


class Scorer(Protocol):
    """Gives a candidate its quality."""

    def score(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> Quality:
        """Never raises for what a candidate can do wrong; equal arguments give equal losses."""
        ...


def as_score(scorer: Scorer, to_config: Callable[[Mapping[str, Any]], ModelConfig], budget_tokens: int, seed: int) -> Score:
    """The scorer as a service calls it: candidate in flat form -> named numbers. Its entries `seed` and `budget_tokens`, if
    any, take the place of the arguments. Raises Infeasible where the candidate cannot be had, RuntimeError where asking again
    may help."""

    def score(candidate: Mapping[str, Any]) -> dict[str, float]:
        budget = int(candidate.get("budget_tokens", budget_tokens))
        found = scorer.score(to_config(candidate), budget, int(candidate.get("seed", seed)))
        if found.status == "infeasible":
            raise Infeasible(found.reason)
        if found.loss is None:
            raise RuntimeError(found.reason)
        start = {} if found.start_loss is None else {"start_loss": found.start_loss}
        return {"loss": found.loss, "tokens": float(found.tokens), "score_seconds": found.seconds, **start}

    return score


@dataclass(frozen=True)
class TrainedScorer:
    """Asks a training function, and keeps what is not a finite loss from passing for one."""

    train: Callable[[ModelConfig, int, int], Quality]
    """(candidate, budget in tokens, seed) -> quality."""

    def score(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> Quality:
        if budget_tokens < 1:
            raise ValueError(f"budget_tokens={budget_tokens}; expected at least 1")
        return self.train(candidate, budget_tokens, seed)


@dataclass(frozen=True)
class TabulatedScorer:
    """Looks losses up: {(config_key, budget in tokens): loss}, NaN for a candidate that diverged."""

    table: Mapping[tuple[str, int], float]

    def score(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> Quality:
        key = config_key(candidate)
        if (key, budget_tokens) not in self.table:
            return Quality(status="failed", reason=f"the table has no candidate {key} at {budget_tokens} tokens")
        loss = self.table[key, budget_tokens]
        if not math.isfinite(loss):
            return Quality(status="infeasible", tokens=budget_tokens, reason=f"loss {loss} in the table")
        return Quality(status="ok", loss=loss, tokens=budget_tokens)


@dataclass(frozen=True)
class SyntheticScorer:
    """A loss with the shape of a scaling law, plus seeded noise: L = c + A / N^a + B / D^b + what missing attention costs.

    N is parameters outside the embedding, D the budget; the form is that of Hoffmann et al. 2022 (arXiv 2203.15556,
    equation 2), the constants are made up. Runs of three and more blocks without full attention cost extra.
    """

    noise: float = 0.0
    """Standard deviation added to the loss."""
    infeasible_share: float = 0.0
    """Share of candidates that diverge, the same ones every time."""
    failure_share: float = 0.0
    """Share of calls, by seed, that fail."""

    def score(self, candidate: ModelConfig, budget_tokens: int, seed: int) -> Quality:
        key = config_key(candidate)
        if _draw(key, "diverges").random() < self.infeasible_share:
            return Quality(status="infeasible", tokens=budget_tokens, reason="loss nan at step 7 (synthetic)")
        draw = _draw(key, f"{budget_tokens}/{seed}")
        if draw.random() < self.failure_share:
            return Quality(status="failed", reason="worker lost (synthetic)")
        loss = self.true_loss(candidate, budget_tokens) + draw.gauss(0.0, self.noise)
        return Quality(status="ok", loss=loss, tokens=budget_tokens)

    @staticmethod
    def true_loss(candidate: ModelConfig, budget_tokens: int) -> float:
        """Without noise."""
        size: float = candidate.num_params() - candidate.vocab_size * candidate.hidden_size
        size *= 1 + 0.3 * (1 - 1 / candidate.block_repeat)
        loss = 1.7 + 60.0 / size**0.34 + 400.0 / budget_tokens**0.45
        run = worst = 0
        for kind in candidate.attention_kinds:
            run = 0 if kind == "full" else run + 1
            worst = max(worst, run)
            loss += {"full": 0.0, "window": 0.004, "skip": 0.01}[kind]
        return loss + 0.1 * max(worst - 2, 0)


def _draw(*parts: str) -> random.Random:
    return random.Random(hashlib.sha256(json.dumps(parts).encode()).digest())


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b of two rankings, ties counted; NaN where one of them is constant. O(n^2): meant for tens of points.

    (SciPy's would be the only use of it in an installation without the search extra.)
    """
    first, second = (np.sign(np.subtract.outer(np.asarray(v, float), np.asarray(v, float))) for v in (one, other))
    scale = math.sqrt(float((first**2).sum()) * float((second**2).sum()))
    return float((first * second).sum()) / scale if scale else math.nan


@dataclass
class RankAgreement:
    """Whether short scores order candidates as full ones do: they may be used from `least` pairs with tau >= `bar` on.

    MobileLLM-Flash found 0.74 on 20 (arXiv 2603.15954) and searched by short scores.
    """

    least: int = 20
    bar: float = 0.7
    pairs: dict[str, tuple[float, float]] = field(default_factory=dict)
    """By candidate: (short, full) losses."""

    def add(self, candidate: ModelConfig, short: Quality, full: Quality) -> None:
        """Candidates without two losses say nothing about order."""
        if short.loss is not None and full.loss is not None:
            self.pairs[config_key(candidate)] = (short.loss, full.loss)

    @property
    def tau(self) -> float:
        """NaN before there are two pairs."""
        return kendall_tau(*zip(*self.pairs.values(), strict=True)) if len(self.pairs) > 1 else math.nan

    @property
    def usable(self) -> bool:
        return len(self.pairs) >= self.least and self.tau >= self.bar

    def explain(self) -> str:
        """One line for a report."""
        verdict = "used" if self.usable else "not used"
        return (f"short scores are {verdict}: Kendall tau {self.tau:.2f} on {len(self.pairs)} candidates, "
                f"wanted {self.bar:g} on {self.least}")
