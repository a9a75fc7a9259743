"""Grouped-query attention: who sees whom is worked out once a forward pass, not once a layer.

Dimensions: B batch, T new tokens, S tokens seen so far (cached ones included), H heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.config import ModelConfig
from modeling.layers import Linear, rope_frequencies, rope_tables, rotate
from modeling.moe import RoutingRecord


@dataclass(frozen=True)
class Layout:
    """Positions and visibility of one forward pass, shared by all layers.

    A mask of None is plain causal attention without cached tokens, which kernels do faster than a given mask.
    """

    cos: Tensor
    sin: Tensor
    """[B or 1, 1, T, D]."""
    masks: dict[str, Tensor | None]
    """Attention kind to boolean [B or 1, 1, T, S], true where a query sees a key."""
    packed: bool = False
    """Rows hold several documents each."""
    record: RoutingRecord | None = None
    """For layers with experts, in training."""


def build_layout(
    config: ModelConfig, tokens: Tensor, positions: Tensor | None, past: int, dtype: torch.dtype,
    record: RoutingRecord | None = None,
) -> Layout:  # fmt: skip
    """Work out RoPE and masks.

    Args:
        tokens: int64 [B, T]; only shape and device matter.
        positions: int64 [B, T] of packed documents, each starting at 0, or None for one document a row.
        past: tokens already cached; packed documents cannot be continued.
    """
    length, device = tokens.shape[1], tokens.device
    index = torch.arange(past, past + length, device=device)
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    cos, sin = rope_tables(index[None] if positions is None else positions, frequencies, dtype)
    masks: dict[str, Tensor | None] = {}
    for kind in set(config.attention_kinds) - {"skip"}:
        window = config.window if kind == "window" and config.window < past + length else None
        if positions is None and past == 0 and window is None:
            masks[kind] = None
        else:
            masks[kind] = _mask(index, positions, past, window)
    return Layout(cos[:, None], sin[:, None], masks, positions is not None, record)


def _mask(index: Tensor, positions: Tensor | None, past: int, window: int | None) -> Tensor:
    keys = torch.arange(past + len(index), device=index.device)
    distance = index[:, None] - keys[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if positions is None:
        return seen[None, None]
    document = (positions == 0).cumsum(-1)
    return (seen[None] & (document[:, :, None] == document[:, None, :]))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention [B, H, T, D] of q over k and v [B, K, S, D]; `mask` as in `Layout`, never showing a later key.

    On a CPU the kernel computes what a mask hides; there a row goes in pieces, each over the keys up to its own end
    (a tenth less time at 256 tokens, a third less from 512 on).
    """
    grouped, length = q.shape[1] != k.shape[1], q.shape[2]
    # Compiling is asked before the length: a comparison of an exported program's length would narrow what it accepts.
    whole = mask is None or q.device.type != "cpu" or torch.compiler.is_compiling()
    piece = length if whole else 64 if length <= 256 else 128
    if whole or length <= piece or mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    past, pieces = k.shape[2] - length, []
    for start in range(0, length, piece):
        end = min(start + piece, length)
        seen = slice(past + end)
        pieces.append(F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, seen], v[:, :, seen], attn_mask=mask[:, :, start:end, seen], enable_gqa=grouped
        ))  # fmt: skip
    return torch.cat(pieces, dim=2)


class LayerCache:
    """Keys and values of one executed layer, [B, K, max_tokens, D]."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, keys: Tensor, values: Tensor, past: int) -> tuple[Tensor, Tensor]:
        """Store T new tokens after `past` and return all of them."""
        end = past + keys.shape[2]
        self.keys[:, :, past:end] = keys
        self.values[:, :, past:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Projections q, k, v, o; RoPE; optional weight-free RMS norm of every query and key head (MobileLLM-R1)."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.head_dim = config.head_dim
        self.qk_eps = config.norm_eps if config.qk_norm else None
        self.q = Linear(config.hidden_size, config.query_size)
        self.k = Linear(config.hidden_size, config.kv_size)
        self.v = Linear(config.hidden_size, config.kv_size)
        self.o = Linear(config.query_size, config.hidden_size)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None, past: int) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q = rotate(self.q(x).view(shape).transpose(1, 2), layout.cos, layout.sin)
        k = rotate(self.k(x).view(shape).transpose(1, 2), layout.cos, layout.sin)
        v = self.v(x).view(shape).transpose(1, 2)
        if self.qk_eps is not None:  # a rotation keeps the norm, so after it is the same as before
            q = F.rms_norm(q, (self.head_dim,), eps=self.qk_eps)
            k = F.rms_norm(k, (self.head_dim,), eps=self.qk_eps)
        if cache is not None:
            k, v = cache.extend(k, v, past)
        out = attend(q, k, v, layout.masks[self.kind])
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))
