"""What a model is, as data: sizes, layer pattern, sharing, tying.

Everything that depends only on shape (parameters, FLOPs, weight and cache bytes) is computed here, without building
the module; `tests/modeling/test_config.py` holds these sums to the built module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

AttentionKind = Literal["full", "window", "skip"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the MobileLLM line: pre-norm RMSNorm, RoPE, GQA, SwiGLU, no biases."""

    __pydantic_config__ = {"extra": "forbid"}

    vocab_size: int
    hidden_size: int
    num_layers: int
    """Stored blocks. With `block_repeat` > 1 each runs that many times in a row."""
    num_heads: int
    num_kv_heads: int
    """Key/value heads; equal to num_heads for plain attention, 1 for multi-query."""
    ffn_size: int
    head_dim: int = 64
    max_positions: int = 2048
    """Longest sequence the model is meant for, in tokens."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = True
    qk_norm: bool = False
    """Weight-free RMS normalisation of each query and key head (MobileLLM-R1)."""
    block_repeat: int = 1
    """Block-wise sharing: how often each stored block runs before the next (2 for MobileLLM-LS)."""
    attention: tuple[AttentionKind, ...] = ()
    """Attention kind of each stored block; empty means full everywhere. `skip` blocks are feed-forward only."""
    window: int = 512
    """Positions a `window` layer sees, itself included, in tokens."""

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
