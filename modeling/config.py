"""What a model is, as data: sizes, layer pattern, sharing, tying.

Everything that depends only on shape (parameters, FLOPs, weight and cache bytes) is computed here, without building
the module; `tests/modeling/test_config.py` holds these sums to the built module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from modeling.moe_config import MoEConfig

# Bounds are checked where a recipe is read (launch/config.py).
Size = Annotated[int, Ge(1), Le(2**31 - 1)]
AttentionKind = Literal["full", "window", "skip"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotation for a longer context, as Llama 3.1 has it (arXiv 2407.21783, and its released code).

    A wave longer than `original_positions / low_frequency` turns `factor` times slower, one shorter than
    `original_positions / high_frequency` as before, between them by linear blending. MobileMoE's release has both at 1.
    """

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    factor: Annotated[float, Ge(1)]
    original_positions: Size
    low_frequency: Annotated[float, Gt(0)] = 1.0
    high_frequency: Annotated[float, Gt(0)] = 4.0

    def __post_init__(self) -> None:
        if self.high_frequency < self.low_frequency:
            raise ValueError(f"model.rope_scaling.high_frequency={self.high_frequency} is below "
                             f"low_frequency={self.low_frequency}; expected at least that")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the MobileLLM line: pre-norm RMSNorm, RoPE, GQA, SwiGLU, no biases."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    vocab_size: Size
    hidden_size: Size
    num_layers: Size
    """Stored blocks. With `block_repeat` > 1 each runs that many times in a row."""
    num_heads: Size
    num_kv_heads: Size
    """Key/value heads; equal to num_heads for plain attention, 1 for multi-query."""
    ffn_size: Size
    head_dim: Size = 64
    max_positions: Size = 2048
    """Longest sequence the model is meant for, in tokens."""
    rope_theta: Annotated[float, Gt(0)] = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: Annotated[float, Gt(0)] = 1e-5
    init_std: Annotated[float, Ge(0)] = 0.02
    tie_embeddings: bool = True
    qk_norm: bool = False
    """Weight-free RMS normalisation of each query and key head (MobileLLM-R1)."""
    block_repeat: Size = 1
    """Block-wise sharing: how often each stored block runs before the next (2 for MobileLLM-LS)."""
    attention: tuple[AttentionKind, ...] = ()
    """Attention kind of each stored block; empty means full everywhere. `skip` blocks are feed-forward only."""
    window: Size = 512
    """Positions a `window` layer sees, itself included, in tokens."""
    output_tokens: tuple[Annotated[int, Ge(0)], ...] = ()
    """A trimmed head (Llama Guard 3-1B-INT4): the only ids that it can say, ascending; empty is the whole vocabulary."""
    moe: MoEConfig | None = None
    """Experts in place of the feed-forward (MobileMoE)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size", "head_dim",
                     "max_positions", "block_repeat", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                "use a divisor of num_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.attention and len(self.attention) != self.num_layers:
            raise ValueError(
                f"model.attention names {len(self.attention)} layers but model.num_layers={self.num_layers}; "
                "give one kind a layer, or none for full attention everywhere"
            )
        if self.moe is not None and self.moe.dense_layers > self.num_layers:
            raise ValueError(f"model.moe.dense_layers={self.moe.dense_layers} is more than "
                             f"model.num_layers={self.num_layers}; expected at most all of them")
        if self.output_tokens:
            self._check_output_tokens()

    def _check_output_tokens(self) -> None:
        ids = self.output_tokens
        if self.tie_embeddings:
            raise ValueError("model.output_tokens trims the head, and model.tie_embeddings ties it to the embedding; untie it")
        rising = all(first < second for first, second in zip(ids, ids[1:], strict=False))
        if not rising or ids[0] < 0 or ids[-1] >= self.vocab_size:
            raise ValueError(f"model.output_tokens must be ascending ids below model.vocab_size={self.vocab_size}; "
                             f"it goes from {ids[0]} to {ids[-1]}")

    @property
    def head_size(self) -> int:
        """Rows of the head: tokens that it can say."""
        return len(self.output_tokens) or self.vocab_size

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> ModelConfig:
        """From what JSON or TOML made of one: lists are tuples again. Raises TypeError for unknown fields, or no table."""
        if not isinstance(values, Mapping):
            raise TypeError(f"a model is a table of sizes; found {type(values).__name__}")
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        for name, kind in (("moe", MoEConfig), ("rope_scaling", RopeScaling)):
            part = fields.get(name)
            if isinstance(part, Mapping):
                fields[name] = kind(**part)
            elif part is not None:
                raise TypeError(f"model.{name}={part!r}; expected a table or nothing")
        return cls(**fields)

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The attention kind of every stored block."""
        full: tuple[AttentionKind, ...] = ("full",)
        return self.attention or full * self.num_layers

    @property
    def num_executed_layers(self) -> int:
        return self.num_layers * self.block_repeat

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def moe_at(self, layer: int) -> MoEConfig | None:
        """The experts of a stored block; None where its feed-forward is dense."""
        return self.moe if self.moe is not None and layer >= self.moe.dense_layers else None

    @property
    def num_moe_layers(self) -> int:
        """Stored blocks with experts."""
        return 0 if self.moe is None else self.num_layers - self.moe.dense_layers

    def num_params(self) -> int:
        """Stored parameters; a tied head and a repeated block count once."""
        return self._outer_params() + sum(
            self._attention_params(kind) + self._feed_forward_params(self.moe_at(layer)) + self.hidden_size
            for layer, kind in enumerate(self.attention_kinds)
        )

    def num_active_params(self) -> int:
        """Parameters that take part in one token: of the routed experts, `top_k`. A dense model's are all.

        The embedding counts whole, as in MobileMoE's tables: tied, it is the head, which every token multiplies.
        """
        idle = 0 if self.moe is None else (self.moe.num_experts - self.moe.top_k) * self.moe.expert_params(self.hidden_size)
        return self.num_params() - self.num_moe_layers * idle

    def _outer_params(self) -> int:
        return (self.vocab_size + (0 if self.tie_embeddings else self.head_size) + 1) * self.hidden_size

    def _attention_matrices(self) -> int:
        return 2 * self.hidden_size * (self.query_size + self.kv_size)

    def _attention_params(self, kind: AttentionKind) -> int:
        return 0 if kind == "skip" else self._attention_matrices() + self.hidden_size

    def _feed_forward_params(self, moe: MoEConfig | None, *, active: bool = False) -> int:
        if moe is None:
            return 3 * self.hidden_size * self.ffn_size
        return moe.active_layer_params(self.hidden_size) if active else moe.layer_params(self.hidden_size)

    def flops_per_token(self, context: int = 0, *, training: bool = False) -> int:
        """Floating-point operations (2 a multiply-add) of one token's forward pass; three times that in training.

        `context` tokens are attended to (a window layer sees at most its window), itself included; norms, RoPE and
        softmax are not counted, nor is the embedding's look-up.
        """
        matmuls = self.hidden_size * self.head_size
        scores = 0
        for layer, kind in enumerate(self.attention_kinds):
            matmuls += self.block_repeat * self._feed_forward_params(self.moe_at(layer), active=True)
            if kind != "skip":
                seen = context if kind == "full" else min(context, self.window)
                matmuls += self.block_repeat * self._attention_matrices()
                scores += self.block_repeat * 2 * self.query_size * seen
        return 2 * (matmuls + scores) * (3 if training else 1)

    def weight_bytes(self, bits: float = 16, group_size: int | None = None, *, scale_bits: int = 16) -> int:
        """Size of the weights: matrices at `bits` with one scale a group, norms in fp32 where the matrices are integers.

        Routers are fp32 there too: they are half a percent of the weights, and choose among the others.
        """
        norms = self.hidden_size * (1 + sum(1 if kind == "skip" else 2 for kind in self.attention_kinds))
        routers = 0 if self.moe is None else self.num_moe_layers * self.moe.router_params(self.hidden_size)
        matrices = self.num_params() - norms - routers
        scales = 0 if group_size is None else math.ceil(matrices / group_size) * scale_bits
        other_bits = bits if group_size is None else 32
        return math.ceil((matrices * bits + scales + (norms + routers) * other_bits) / 8)

    def kv_bytes(self, tokens: int, bits: float = 16) -> int:
        """Size of the key/value cache after `tokens`; each pass of a repeated block has its own slots."""
        kept = sum(
            tokens if kind == "full" else min(tokens, self.window) for kind in self.attention_kinds if kind != "skip"
        )
        return math.ceil(2 * self.block_repeat * kept * self.kv_size * bits / 8)
