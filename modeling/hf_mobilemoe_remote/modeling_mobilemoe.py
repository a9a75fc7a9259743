"""MobileMoE (arXiv 2605.27358) for `transformers`, written beside an export by Pocketforge.

Written from the paper and the released configuration, not from the released code. It computes in the type of its norms;
weights in INT4 are made whole as they are used, experts one at a time. For clarity and equality, not for speed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_mobilemoe import MobileMoEConfig


def decode(qweight: Tensor, scale: Tensor) -> Tensor:
    """Weights [..., n] of bytes [..., n / 2], low nibble first, and one scale for 32 weights."""
    codes = (torch.stack((qweight << 4, qweight), -1).view(torch.int8) >> 4).flatten(-2).float()
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)).flatten(-2)


class Matrix(nn.Module):
    """y = x W^T with W [outputs, inputs] as it is or in INT4."""

    qweight: Tensor
    weight_scale: Tensor

    def __init__(self, outputs: int, inputs: int, config: MobileMoEConfig) -> None:
        super().__init__()
        self.packed = config.quantization is not None
        if self.packed:
            self.register_buffer("qweight", torch.zeros(outputs, inputs // 2, dtype=torch.uint8))
            self.register_buffer("weight_scale", torch.zeros(outputs, inputs // 32, dtype=torch.float16))
        else:
            self.weight = nn.Parameter(torch.zeros(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, decode(self.qweight, self.weight_scale).to(x.dtype) if self.packed else self.weight)

    def rows(self, ids: Tensor) -> Tensor:
        """W as an embedding table."""
        return decode(self.qweight[ids], self.weight_scale[ids]) if self.packed else F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, width: int, config: MobileMoEConfig) -> None:
        super().__init__()
        self.gate_proj = Matrix(width, config.hidden_size, config)
        self.up_proj = Matrix(width, config.hidden_size, config)
        self.down_proj = Matrix(config.hidden_size, width, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """SwiGLU experts, inputs first: gate_up [E, D, 2 F] (gate, then up), down [E, F, D]; INT4 along the last axis."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        experts, size, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.packed = config.quantization is not None
        for name, inputs, outputs in (("gate_up", size, 2 * width), ("down", width, size)):
            if self.packed:
                self.register_buffer(f"{name}_qweight", torch.zeros(experts, inputs, outputs // 2, dtype=torch.uint8))
                self.register_buffer(f"{name}_scale", torch.zeros(experts, inputs, outputs // 32, dtype=torch.float16))
            else:
                self.register_parameter(f"{name}_proj", nn.Parameter(torch.zeros(experts, inputs, outputs)))

    def _matrix(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        if self.packed:
            return decode(getattr(self, f"{name}_qweight")[expert], getattr(self, f"{name}_scale")[expert]).to(dtype)
        return getattr(self, f"{name}_proj")[expert]

    def forward(self, rows: Tensor, chosen: Tensor, mix: Tensor) -> Tensor:
        """Rows [T, D], their experts [T, k] and mixing weights [T, k]."""
        out = torch.zeros_like(rows, dtype=torch.float32)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (rows[token] @ self._matrix("gate_up", expert, rows.dtype)).chunk(2, -1)
            made = (F.silu(gate) * up) @ self._matrix("down", expert, rows.dtype)
            out.index_add_(0, token, made.float() * mix[token, place, None])
        return out.to(rows.dtype)


class Router(nn.Module):
    """fp32 whatever the model is: a rounded logit moves a token to another expert."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_local_experts, config.hidden_size))

    def forward(self, rows: Tensor) -> Tensor:
        return F.linear(rows.float(), self.weight.float()).sigmoid()


class MoE(nn.Module):
    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config)
        self.register_buffer("expert_bias", torch.zeros(config.num_local_experts))
        self.experts = Experts(config)
        if config.intermediate_size_mlp:
            self.shared_expert = FeedForward(config.intermediate_size_mlp, config)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scores = self.router(rows)
        chosen = (scores + self.expert_bias.float()).topk(self.config.num_experts_per_tok, -1).indices
        mix = scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            mix = mix / mix.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        mixed = self.experts(rows, chosen, mix * self.config.routed_scaling_factor).view_as(x)
        return mixed + self.shared_expert(x) if self.config.intermediate_size_mlp else mixed


def frequencies(config: MobileMoEConfig, device: torch.device) -> Tensor:
    """Radians a position of every pair, slowed down for long waves where `rope_scaling` of type llama3 says so."""
    scaling = config.rope_parameters
    plain = 1.0 / scaling["rope_theta"] ** (torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    if scaling["rope_type"] == "default":
        return plain
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns - low) / max(high - low, torch.finfo(torch.float32).tiny)).clamp(0.0, 1.0)
    return plain * (kept + (1.0 - kept) / scaling["factor"])


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the neighbours (2i, 2i + 1) of x [B, H, T, D] by angles [B, T, D / 2]."""
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: MobileMoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Matrix(queries, config.hidden_size, config)
        self.k_proj = Matrix(keys, config.hidden_size, config)
        self.v_proj = Matrix(keys, config.hidden_size, config)
        self.o_proj = Matrix(config.hidden_size, queries, config)

    def forward(self, x: Tensor, angles: Tensor, seen: Tensor, cache: Cache | None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
                   for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, angles), rotate(k, angles)
        if self.config.use_qk_norm:
            size, eps = (self.config.head_dim,), self.config.rms_norm_eps
            q, k = (F.rms_norm(heads.float(), size, eps=eps).to(x.dtype) for heads in (q, k))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: MobileMoEConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MoE(config)

    def forward(self, x: Tensor, angles: Tensor, seen: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, seen, cache)
        return x + self.feed_forward(self.post_attention_layernorm(x))


class Body(nn.Module):
    """Everything under the name `model.`: from ids to normed hidden states."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Matrix(config.vocab_size, config.hidden_size, config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Tensor:
        past, length = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
        index = torch.arange(past + length, device=input_ids.device)
        own = index[past:, None] == index[None, :]
        seen = (index[past:, None] >= index[None, :])[None, None]
        if attention_mask is not None:  # padding is seen by itself only: attention over nothing is no number
            seen = (seen & attention_mask[:, None, None, :].bool()) | own
        positions = index[past:].unsqueeze(0) if position_ids is None else position_ids
        angles = positions.float().unsqueeze(-1) * frequencies(self.config, input_ids.device)
        x = self.embed_tokens.rows(input_ids).to(self.norm.weight.dtype)
        for layer in self.layers:
            x = layer(x, angles, seen, cache)
        return self.norm(x)


class MobileMoEForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MobileMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["router"]

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__(config)
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = Matrix(config.vocab_size, config.hidden_size, config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        return None  # a tied head has no module of its own, and the other ties to nothing

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Cache | None = None, labels: Tensor | None = None, use_cache: bool | None = None, **_: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values)
        logits = (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head)(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
