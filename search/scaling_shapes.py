"""Models that may be built for the scaling law, and what they cost by their own `ModelConfig`.

MobileMoE's rules (arXiv 2605.27358): a feed-forward four times as wide as the model, about one layer for every 40 of width,
heads of 64; experts are equal parts of the feed-forward, half of those that a token uses merged into a shared one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from modeling.config import ModelConfig
from modeling.moe_config import MoEConfig
from search.scaling_law import Choice, LawError

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
        if self.vocab_size < 1:
            raise LawError(f"vocab_size is {self.vocab_size}; expected at least 1")
        if self.choices is not None and not self.choices:
            raise LawError("no way to cut experts is left; name a granularity")


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
