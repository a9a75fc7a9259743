"""The one decoder of all families, from token ids to logits. It knows one device.

Pre-norm blocks of grouped-query attention and SwiGLU. What varies is data (`ModelConfig`): a block may see everything,
a window, or have no attention at all; its feed-forward may be a mixture of experts (MobileMoE); each stored block may run
several times in a row (MobileLLM-LS), every pass with its own key/value slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.attention import Attention, LayerCache, Layout, build_layout
from modeling.config import ModelConfig
from modeling.feed_forward import FeedForward
from modeling.layers import Embedding, Linear, RMSNorm
from modeling.moe import MoE, RoutingRecord


def spread_logits(logits: Tensor, config: ModelConfig) -> Tensor:
    """Logits over the whole vocabulary of those over a head's rows: -inf where it has none."""
    if not config.output_tokens:
        return logits
    whole = logits.new_full((*logits.shape[:-1], config.vocab_size), float("-inf"))
    return whole.index_copy(-1, torch.tensor(config.output_tokens, device=logits.device), logits)


class KVCache:
    """Slots for every executed layer that attends, and how many tokens they hold."""

    def __init__(
        self, config: ModelConfig, batch: int, max_tokens: int, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        shape = (batch, config.num_kv_heads, max_tokens, config.head_dim)
        kinds = [kind for kind in config.attention_kinds for _ in range(config.block_repeat)]
        self.layers = [None if kind == "skip" else LayerCache(shape, dtype, torch.device(device)) for kind in kinds]
        self.max_tokens = max_tokens
        self.length = 0


def _feed_forward(config: ModelConfig, layer: int) -> FeedForward | MoE:
    return FeedForward(config.hidden_size, config.ffn_size) if config.moe_at(layer) is None else MoE(config)


def _apply(part: nn.Module, x: Tensor, layout: Layout) -> Tensor:
    result: Tensor = part(x, layout.record) if isinstance(part, MoE) else part(x)
    return result


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, config.attention_kinds[layer])
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = _feed_forward(config, layer)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None, past: int = 0) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layout, cache, past)
        return x + _apply(self.feed_forward, self.feed_forward_norm(x), layout)


class SkipBlock(nn.Module):
    """A block without attention (MobileLLM-Flash): x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = _feed_forward(config, layer)

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None = None, past: int = 0) -> Tensor:
        return x + _apply(self.feed_forward, self.feed_forward_norm(x), layout)


class Decoder(nn.Module):
    """A language model of `config`; weights are set by `modeling.init.init_weights` or loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            SkipBlock(config, layer) if kind == "skip" else Block(config, layer)
            for layer, kind in enumerate(config.attention_kinds)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.head_size)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V] of int64 tokens [B, T], -inf for what a trimmed head cannot say; see `hidden`."""
        x, weight = self.head_operands(self.hidden(tokens, positions, cache))
        return spread_logits(F.linear(x, weight), self.config)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
        record: RoutingRecord | None = None,
    ) -> Tensor:  # fmt: skip
        """Normed hidden states [B, T, hidden_size].

        Args:
            tokens: int64 [B, T].
            positions: int64 [B, T] for rows packed with documents: each starts where its position is 0 and sees only
                itself. None is one document a row.
            cache: tokens seen before; the new ones are added to it. Not together with `positions`.
            record: in training, how experts' rows are dispatched; filled with what the routers did.

        Raises:
            ValueError: `positions` with a cache, or a cache too small for the tokens.
        """
        past = 0 if cache is None else cache.length
        if cache is not None and positions is not None:
            raise ValueError("packed positions cannot be continued from a cache; give one document a row")
        if cache is not None and past + tokens.shape[1] > cache.max_tokens:
            raise ValueError(f"the cache holds {cache.max_tokens} tokens, {past} are used and {tokens.shape[1]} more given")
        x = self.embed(tokens)
        layout = build_layout(self.config, tokens, positions, past, x.dtype, record)
        slots = iter(cache.layers) if cache is not None else None
        for block in self.blocks:
            for _ in range(self.config.block_repeat):
                x = block(x, layout, None if slots is None else next(slots), past)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.norm(x)

    def head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(x, W) with logits = x @ W.T: what a chunked loss multiplies. Row i of a trimmed head is `output_tokens[i]`."""
        return self.embed.head_operands(hidden) if self.head is None else self.head.head_operands(hidden)
