"""The scaling law of MobileMoE (arXiv 2605.27358): loss from active parameters, tokens, and experts.

    L(N, D, E; x) = A E^^d N^(a + g ln E^)  +  B E^^w D^(b + z ln E^)  +  c
    1/E^ = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max

N active parameters and D training tokens, both in billions; E how many times more experts there are than a token uses; E^
saturates (arXiv 2202.01169, equation 6). x is how the experts are cut: their granularity, and whether a part of them is
merged into one that every token uses. With x fixed this is the joint law of arXiv 2502.05172, at E = 1 Chinchilla's
(arXiv 2203.15556, equation 10). Losses are in nats a token, so constants hold for one tokenizer and one kind of text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
BILLION = 1e9
TWO_SIDED_95 = NormalDist().inv_cdf(0.975)


class LawError(ValueError):
    """Runs, a file or a question that no law can be made from or asked; one line says what to do."""


def effective_experts(experts: ArrayLike, start: float = 1.0, most: float = 32.0) -> Array:
    """E^ of the module: 1 for 1 expert, 6.42 for 8, 16 for 32 where experts saturate at 32."""
    free = 1 / (1 / start - 1 / most)
    return 1 / (1 / (np.asarray(experts, float) - 1 + free) + 1 / most)


@dataclass(frozen=True)
class Constants:
    """Of the equation, N and D in billions. `gamma` is its g, the others are Greek for the letter that they begin with."""

    A: float
    delta: float
    alpha: float
    gamma: float
    B: float
    omega: float
    beta: float
    zeta: float
    c: float

    @classmethod
    def from_vector(cls, theta: Array) -> Constants:
        """From `vector`."""
        values = np.array(theta, float)
        values[[0, 4, 8]] = np.exp(np.clip(values[[0, 4, 8]], -700, 700))
        return cls(*map(float, values))

    def vector(self) -> Array:
        """The nine numbers as they are fitted: A, B and c as logarithms, so that none of them turns negative."""
        theta = np.array(astuple(self))
        theta[[0, 4, 8]] = np.log(theta[[0, 4, 8]])
        return theta

    def loss(self, active: ArrayLike, tokens: ArrayLike, effective: ArrayLike) -> Array:
        """Nats a token. active, tokens: in billions. effective: E^, of `effective_experts`."""
        e = np.log(effective)
        capacity = self.A * np.exp(self.delta * e + (self.alpha + self.gamma * e) * np.log(active))
        data = self.B * np.exp(self.omega * e + (self.beta + self.zeta * e) * np.log(tokens))
        return np.asarray(capacity + data + self.c)


@dataclass(frozen=True, order=True)
class Choice:
    """x of the law: how experts are cut. A dense feed-forward has no such choice and counts as every one."""

    granularity: int = 1
    """Width of a dense feed-forward over that of a routed expert."""
    shared: bool = False
    """Half of a token's experts merged into one that every token uses (MobileMoE: 4 of 8)."""

    def __post_init__(self) -> None:
        if self.granularity < (2 if self.shared else 1):
            raise LawError(f"granularity {self.granularity}{' with a shared expert' if self.shared else ''}; expected at least "
                           f"{2 if self.shared else 1}")  # fmt: skip

    def __str__(self) -> str:
        return f"g{self.granularity}{'+shared' if self.shared else ''}"

    @classmethod
    def parse(cls, text: str) -> Choice:
        """From what `str` gives. Raises LawError."""
        digits, plus, rest = text.removeprefix("g").partition("+")
        if not text.startswith("g") or not digits.isdecimal() or (plus and rest != "shared"):
            raise LawError(f"{text!r} names no way to cut experts; expected such as g8 or g8+shared")
        return cls(int(digits), bool(plus))


@dataclass(frozen=True, kw_only=True)
class Part:
    """Constants for one x, and what is known of them."""

    constants: Constants
    active: tuple[float, float]
    """Least and most active parameters of the runs, in billions."""
    tokens: tuple[float, float]
    """The same of training tokens, in billions."""
    experts: tuple[float, float]
    rmse: float
    """Of the runs' losses around the law, in nats a token."""
    noise: float
    """Standard deviation of a run's log loss around the law, degrees of freedom taken off."""
    runs: int = 0
    """How many it was fitted to; 0 where that is not known."""
    draws: tuple[Constants, ...] = ()
    """The bootstrap's; empty where only the constants were published."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % of each constant, by the bootstrap; nothing without draws."""
        if not self.draws:
            return {}
        low, high = np.percentile([astuple(draw) for draw in self.draws], [2.5, 97.5], axis=0)
        return {item.name: (float(a), float(b)) for item, a, b in zip(fields(Constants), low, high, strict=True)}


@dataclass(frozen=True)
class Prediction:
    """Held-out loss of a training run, in nats a token."""

    loss: float
    low: float | None
    """The 95 % interval; None where nothing is known of the law's errors."""
    high: float | None
    warnings: tuple[str, ...] = ()
    """Why not to believe it; empty inside of what was fitted."""


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """Losses of models that were never trained, with how far each may be trusted."""

    common: Part
    """For dense models, and for every x that has no constants of its own."""
    parts: Mapping[Choice, Part] = field(default_factory=dict)
    provenance: str
    counts_embedding: bool = True
    """Whether N counts the embedding (once, where it is tied), as MobileMoE's and Chinchilla's do."""
    start: float = 1.0
    most: float = 32.0
    """E_start and E_max."""

    def part(self, experts: float, choice: Choice | None) -> Part:
        """The constants that count for these experts."""
        return self.common if experts == 1 or choice is None else self.parts.get(choice, self.common)

    def loss(self, active: ArrayLike, tokens: ArrayLike, experts: float, choice: Choice | None = None) -> Array:
        """Nats a token, of arrays of counts (not billions). Asks nothing about ranges: see `predict`."""
        constants = self.part(experts, choice).constants
        return constants.loss(np.asarray(active, float) / BILLION, np.asarray(tokens, float) / BILLION, self.effective(experts))

    def effective(self, experts: ArrayLike) -> Array:
        return effective_experts(experts, self.start, self.most)

    def predict(self, active: float, tokens: float, experts: float, choice: Choice | None = None) -> Prediction:
        """Loss of one run with its interval, and warnings where it lies outside of what was fitted.

        active, tokens: counts. Raises LawError for what is no size. The interval holds the constants' uncertainty and the
        scatter of a single run; of published constants only the scatter, so outside their range there is none.
        """
        for name, value, least in (("active parameters", active, 0), ("tokens", tokens, 0), ("experts", experts, 1)):
            if not math.isfinite(value) or value < least or value == 0:
                raise LawError(f"{name} {value:g}; expected a finite number of at least {least or 'something'}")
        part, warnings = self.part(experts, choice), self.warnings(active, tokens, experts, choice)
        loss = float(self.loss(active, tokens, experts, choice))
        if not part.draws:
            off = TWO_SIDED_95 * part.rmse
            return Prediction(loss, None, None, warnings) if warnings else Prediction(loss, loss - off, loss + off)
        place = active / BILLION, tokens / BILLION, float(self.effective(experts))
        with np.errstate(over="ignore"):  # a draw of runs that leave a constant open may say anything
            logs = np.log([float(draw.loss(*place)) for draw in part.draws])
        scatter = part.noise * np.array([NormalDist().inv_cdf((i + 0.5) / 41) for i in range(41)])
        low, high = np.exp(np.percentile(np.clip(logs[:, None] + scatter, -99, 99), [2.5, 97.5]))
        return Prediction(loss, float(low), float(high), warnings)

    def warnings(self, active: float, tokens: float, experts: float, choice: Choice | None = None) -> tuple[str, ...]:
        """What of a run lies outside of the fitted range, in words."""
        part = self.part(experts, choice)
        said = []
        for name, value, (low, high) in (("N", active / BILLION, part.active), ("D", tokens / BILLION, part.tokens)):
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                said.append(f"{name} = {value:.4g}B is outside of the fitted {low:.4g}B to {high:.4g}B")
        low, high = part.experts
        if not low <= experts <= high:
            said.append(f"E = {experts:g} is outside of the fitted {low:g} to {high:g}")
        return tuple(said)


PUBLISHED = ScalingLaw(
    common=Part(
        constants=Constants(A=0.2388, delta=0.0906, alpha=-0.2833, gamma=0.0387, B=0.6019, omega=1.0593, beta=-0.3210,
                            zeta=-0.3684, c=1.9730),
        active=(0.3, 0.9), tokens=(100, 500), experts=(1, 32), rmse=0.0076, noise=0.0076 / 2.35,
    ),
    provenance="MobileMoE, arXiv 2605.27358, sweep over experts; units inferred (billions)",
)  # fmt: skip
"""The published fit, of which neither the uncertainty nor the constants of other x are known. A prior, not the truth:
above 500B tokens its data term dies with E, and it turns against the very experts that the paper's models have."""
PUBLISHED_CHOICE = Choice(8, True)
"""What the paper's sweeps over granularity and shared expert came to, without constants that we could read."""
