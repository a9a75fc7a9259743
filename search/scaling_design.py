"""Choose a model by the scaling law: the sizes that lose least within caps of memory, arithmetic and training.

    minimise L(N, D, E; x)   subject to   6 N D <= training FLOPs,  2 N <= FLOPs a token,  weights + cache <= memory

(MobileMoE, arXiv 2605.27358.) What is minimised over are models that can be built by the paper's rules, not real numbers:
a feed-forward four times as wide as the model, about one layer for every 40 of width, heads of 64. Each is held to the caps
by what its own `ModelConfig` says of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modeling.config import ModelConfig
from modeling.moe_config import MoEConfig
from search.scaling_law import PUBLISHED_CHOICE, Choice, LawError, Prediction, ScalingLaw

FLOPS_OF_TRAINING = 6
"""A parameter that takes part in a token: 2 forward, 4 backward."""
WIDTH_STEP = 64
WIDTH_A_LAYER = 40
SLACK = 0.1
"""How far the number of layers may be off its rule, as a share."""
GROUP = 32
"""Widths of experts are multiples of the packed file's group."""
ROUTE_SCALE = 2.5
"""Of the released MobileMoE, for mixtures of several experts a token."""


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a model may cost. None is no cap."""

    memory_bytes: float | None = None
    """Weights and the cache of `context` tokens, as `ModelConfig.weight_bytes` and `kv_bytes` count them."""
    token_flops: float | None = None
    """Of one token's forward pass: 2 an active parameter; attention to earlier tokens only where `attention` is on."""
    train_flops: float | None = None
    """6 N D of the whole training."""
    tokens: float | None = None
    """Train on exactly so many; None takes what train_flops allows."""
    context: int = 8192
    attention: bool = False
    weight_bits: float = 4
    group_size: int | None = 32
    kv_bits: float = 8

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "token_flops", "train_flops", "tokens", "weight_bits", "kv_bits", "context"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise LawError(f"{name} is {value:g}; expected a finite number above 0")
        if self.train_flops is None and self.tokens is None:
            raise LawError("neither training FLOPs nor tokens are given; the law needs one of them to know D")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which models may be built."""

    vocab_size: int = 128_256
    kv_heads: tuple[int, ...] = (4,)
    """Each is tried, on widths whose heads it divides."""
    experts: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    choices: tuple[Choice, ...] | None = None
    """None takes those that the law has constants for, else MobileMoE's."""
    max_hidden: int = 4096
    head_dim: int = 64
    rope_theta: float = 500_000.0
    inside: bool = False
    """Only where the law was fitted."""

    def __post_init__(self) -> None:
        for name in ("kv_heads", "experts"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise LawError(f"{name} is {list(getattr(self, name))}; expected whole numbers of at least 1")
        if self.choices is not None and not self.choices:
            raise LawError("no way to cut experts is left; name a granularity")


@dataclass(frozen=True, kw_only=True)
class Design:
    """A model within the caps, and what the law says of it."""

    config: ModelConfig
    experts: int
    choice: Choice | None
    """None for a dense model."""
    tokens: int
    prediction: Prediction
    costs: dict[str, float]
    """By cap: memory_bytes, token_flops, train_flops, of the config itself."""
    caps: Caps

    @property
    def shares(self) -> dict[str, float]:
        """How much of each cap is used, at most 1."""
        limits = {name: getattr(self.caps, name) for name in self.costs}
        return {name: self.costs[name] / limit for name, limit in limits.items() if limit is not None}


def build(hidden: int, layers: int, kv_heads: int, experts: int, choice: Choice, rules: Rules, context: int) -> ModelConfig:
    """The model of those sizes. experts, choice: E and x of the law; one expert is a dense model.

    Of the E * granularity experts as wide as d_ff / granularity a token uses `granularity`; with a shared expert half of
    those are one expert that it always uses: at a granularity of 8 that leaves 60 of 64, 4 a token. Raises LawError where
    the widths do not divide.
    """
    if hidden % rules.head_dim or (hidden // rules.head_dim) % kv_heads:
        raise LawError(f"width {hidden} has no whole heads of {rules.head_dim} in groups of {kv_heads} KV heads")
    ffn = 4 * hidden
    moe = None
    if experts > 1:
        width, merged = ffn // choice.granularity, choice.granularity // 2 if choice.shared else 0
        if ffn % choice.granularity or width % GROUP:
            raise LawError(f"experts of {ffn}/{choice.granularity} are no multiple of {GROUP}")
        top_k = choice.granularity - merged
        moe = MoEConfig(num_experts=experts * choice.granularity - merged, top_k=top_k, expert_size=width,
                        shared_size=merged * width, route_scale=ROUTE_SCALE if top_k > 1 else 1.0)  # fmt: skip
    return ModelConfig(
        vocab_size=rules.vocab_size, hidden_size=hidden, num_layers=layers, num_heads=hidden // rules.head_dim,
        num_kv_heads=kv_heads, ffn_size=ffn, head_dim=rules.head_dim, max_positions=context, rope_theta=rules.rope_theta,
        qk_norm=True, moe=moe,
    )  # fmt: skip


def layers_of(hidden: int) -> range:
    """How many layers a width may have: one for every 40 of width, rounded up as MobileMoE's sizes are, and 10 % around."""
    middle = math.ceil(hidden / WIDTH_A_LAYER)
    return range(min(middle, math.ceil(hidden / WIDTH_A_LAYER * (1 - SLACK))),
                 max(middle, math.floor(hidden / WIDTH_A_LAYER * (1 + SLACK))) + 1)  # fmt: skip


def active_params(config: ModelConfig, with_embedding: bool) -> int:
    """N of the law."""
    return config.num_active_params() - (0 if with_embedding else config.vocab_size * config.hidden_size)


def costs_of(config: ModelConfig, tokens: float, caps: Caps) -> dict[str, float]:
    """What the caps are held against, by their names. A tied embedding is the head, so N counts it."""
    active = config.num_active_params()
    forward = config.flops_per_token(caps.context if caps.attention else 0)
    return {
        "memory_bytes": config.weight_bytes(caps.weight_bits, caps.group_size) + config.kv_bytes(caps.context, caps.kv_bits),
        "token_flops": max(2 * active, forward),
        "train_flops": FLOPS_OF_TRAINING * active * tokens,
    }


def tokens_for(config: ModelConfig, caps: Caps) -> int:
    """D: as given, or what is left of the training FLOPs; at least 1."""
    if caps.tokens is not None:
        return int(caps.tokens)
    assert caps.train_flops is not None
    tokens = int(caps.train_flops / (FLOPS_OF_TRAINING * config.num_active_params()))
    while tokens > 1 and FLOPS_OF_TRAINING * config.num_active_params() * tokens > caps.train_flops:
        tokens -= max(1, tokens >> 50)  # a float of 1e20 is not exact to a token
    return max(1, tokens)


def designs(law: ScalingLaw, caps: Caps, rules: Rules | None = None) -> list[Design]:
    """The best model of each E that keeps every cap, the best of all first. Raises LawError where none does.

    Its line names the cap and the smallest value of it that would do while the others stay.
    """
    rules = rules or Rules()
    candidates = [candidate for family in _families(law, rules, caps.context) for candidate in _sized(family, law, caps)]
    if not candidates:
        raise LawError("no model can be built by these rules; allow other KV heads, experts or a larger width")
    kept = [candidate for candidate in candidates if candidate.keeps(caps)]
    if rules.inside and kept:
        inside = [candidate for candidate in kept if not candidate.warnings(law)]
        if not inside:
            raise LawError(f"no design within the caps is where the law was fitted ({candidates[0].range_words(law)}); "
                           "change the training FLOPs or tokens, or ask outside of it, with warnings")  # fmt: skip
        kept = inside
    found = [_best([c for c in kept if c.experts == experts], law, caps) for experts in sorted({c.experts for c in kept})]
    held = sorted((design for design in found if design is not None), key=lambda design: design.prediction.loss)
    if not held:
        raise LawError(_what_would_do(candidates, caps))
    return held


@dataclass(frozen=True)
class _Candidate:
    config: ModelConfig
    experts: int
    choice: Choice | None
    tokens: int
    loss: float
    active: float
    costs: dict[str, float]

    def keeps(self, caps: Caps, but: str = "") -> bool:
        """Every cap, or all but one."""
        return all(limit is None or name == but or self.costs[name] <= limit
                   for name in self.costs for limit in [getattr(caps, name)])  # fmt: skip

    def warnings(self, law: ScalingLaw) -> tuple[str, ...]:
        return law.warnings(self.active, self.tokens, self.experts, self.choice)

    @staticmethod
    def range_words(law: ScalingLaw) -> str:
        part = law.common
        return f"N {part.active[0]:.4g}B to {part.active[1]:.4g}B, D {part.tokens[0]:.4g}B to {part.tokens[1]:.4g}B"


def _families(law: ScalingLaw, rules: Rules, context: int) -> Iterator[tuple[ModelConfig, int, Choice | None]]:
    """One-layer models of every width and way to have experts."""
    choices = rules.choices or tuple(sorted(law.parts)) or (PUBLISHED_CHOICE,)
    most = law.most if law.common.experts[1] > 1 else 1  # a law of dense models says nothing of others
    for hidden in range(WIDTH_STEP, rules.max_hidden + 1, WIDTH_STEP):
        for kv_heads in rules.kv_heads:
            for experts in sorted({e for e in rules.experts if e <= most}):
                for choice in choices if experts > 1 else choices[:1]:
                    try:
                        yield build(hidden, 1, kv_heads, experts, choice, rules, context), experts, choice if experts > 1 else None
                    except LawError:
                        continue


def _sized(family: tuple[ModelConfig, int, Choice | None], law: ScalingLaw, caps: Caps) -> Iterator[_Candidate]:
    """The family with each number of layers. Costs are the config's own, from two of them: they are linear in the layers."""
    one, experts, choice = family
    layers = np.array(layers_of(one.hidden_size))
    two = replace(one, num_layers=2)
    first, second = (costs_of(config, 1, caps) for config in (one, two))
    sizes = np.array([active_params(one, law.counts_embedding), active_params(two, law.counts_embedding)], float)
    active = sizes[0] + (layers - 1) * (sizes[1] - sizes[0])
    configs = [replace(one, num_layers=int(number)) for number in layers]
    tokens = [tokens_for(config, caps) for config in configs]
    losses = law.loss(active, tokens, experts, choice)
    for place, config in enumerate(configs):
        extra = int(layers[place]) - 1
        costs = {name: first[name] + extra * (second[name] - first[name]) for name in first}
        costs["train_flops"] *= tokens[place]
        yield _Candidate(config, experts, choice, tokens[place], float(losses[place]), float(active[place]), costs)


def _best(candidates: Sequence[_Candidate], law: ScalingLaw, caps: Caps) -> Design | None:
    """The first in order of loss whose own config keeps the caps."""
    for candidate in sorted(candidates, key=lambda item: item.loss):
        exact = replace(candidate, costs=costs_of(candidate.config, candidate.tokens, caps))
        if exact.keeps(caps):
            prediction = law.predict(candidate.active, candidate.tokens, candidate.experts, candidate.choice)
            return Design(config=candidate.config, experts=candidate.experts, choice=candidate.choice, tokens=candidate.tokens,
                          prediction=prediction, costs=exact.costs, caps=caps)  # fmt: skip
    return None


def _what_would_do(candidates: Sequence[_Candidate], caps: Caps) -> str:
    """Which cap nothing keeps, and what would do."""
    units = {"memory_bytes": "bytes of memory", "token_flops": "FLOPs a token", "train_flops": "training FLOPs"}
    for name, unit in units.items():
        others = [candidate for candidate in candidates if candidate.keeps(caps, but=name)]
        if getattr(caps, name) is not None and others:
            least = min(costs_of(item.config, item.tokens, caps)[name] for item in others)
            return (f"no model keeps {getattr(caps, name):.6g} {unit}; with the other caps as they are the smallest that "
                    f"would do is {rounded_up(least)} {unit}")  # fmt: skip
    least = {name: min(item.costs[name] for item in candidates) for name in units if getattr(caps, name) is not None}
    said = ", ".join(f"{rounded_up(value)} {units[name]} (given {getattr(caps, name):.6g})" for name, value in least.items())
    return f"no model keeps the caps together; each alone would have to be at least {said}"


def rounded_up(value: float) -> str:
    """Four digits, never less than the value."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    shown = math.ceil(value / step)
    while float(f"{shown * step:.4g}") < value:
        shown += 1
    return f"{shown * step:.4g}"
