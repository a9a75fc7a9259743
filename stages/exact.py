"""A quantized model that computes in PyTorch what the runtime computes, bit for bit up to the logits' last product.

Activations rounded to INT8 amplify the last bit of a sum: adding in another order tips some of them to the next code, and
logits move by up to a hundredth (docs/runtime.md). So that a checkpoint and its packed file give the same scores and the
same text, a model that is only used goes through the runtime's operations; training does not.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from kernels import ops
from kernels.packed_layout import GROUP, pack_int4
from kernels.runtime import RuntimeLibraryError, library
from modeling.attention import Attention, LayerCache, Layout
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.feed_forward import FeedForward
from modeling.layers import RMSNorm, rotate
from modeling.moe import MoE, RoutingRecord
from quant.apply import FakeQuantExperts, FakeQuantLinear, convert_weight, quantized_weights
from quant.spec import QuantSpec


class ExactLinear(FakeQuantLinear):
    """A frozen linear as a packed matrix."""

    panels: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_int4(x, self.panels, self.out_features)


class ExactRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class ExactFeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x), self.up(x)))


class ExactAttention(Attention):
    """One document a row, with or without a cache; rows packed with several documents are for training."""

    window: int

    def forward(self, x: Tensor, layout: Layout, cache: LayerCache | None, past: int) -> Tensor:
        if layout.packed:
            return super().forward(x, layout, cache, past)
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q, k, v = (projection(x).view(shape).transpose(1, 2) for projection in (self.q, self.k, self.v))
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        if self.qk_eps is not None:
            q, k = ops.rms_norm(q, None, self.qk_eps), ops.rms_norm(k, None, self.qk_eps)
        if cache is not None:
            k, v = cache.extend(k, v, past)
        window = self.window if self.kind == "window" else None
        rows = zip(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), strict=True)  # tokens first, heads second
        out = [ops.attend(row_q, row_k, row_v, past, window) for row_q, row_k, row_v in rows]
        return self.o(torch.stack(out).reshape(batch, length, -1))


class ExactExperts(FakeQuantExperts):
    """Frozen experts as packed matrices."""

    gate_up_panels: list[Tensor]
    down_panels: list[Tensor]

    def expert(self, index: int, rows: Tensor) -> Tensor:
        """Rows [n, D] through one of them."""
        gate, up = ops.linear_int4(rows, self.gate_up_panels[index], self.gate_up.shape[2]).chunk(2, -1)
        return ops.linear_int4(ops.swiglu(gate, up), self.down_panels[index], self.down.shape[2])


class ExactMoE(MoE):
    """The runtime's fused operator, an expert after the other: chosen experts are added in the order of their numbers."""

    def forward(self, x: Tensor, record: RoutingRecord | None = None) -> Tensor:
        if record is not None:
            return super().forward(x, record)
        rows, rule = x.reshape(-1, x.shape[-1]), self.moe
        chosen, weights = ops.route(
            ops.router_logits(rows, self.router.weight), self.router.bias, rule.top_k, softmax=rule.score == "softmax",
            normalize=rule.normalize, scale=rule.route_scale,
        )  # fmt: skip
        experts, results = cast(ExactExperts, self.experts), rows.new_zeros(*chosen.shape, rows.shape[1])
        for index in chosen.unique().tolist():
            token, rank = torch.where(chosen == index)
            results[token, rank] = experts.expert(index, rows[token])
        return ops.mix(None if self.shared is None else self.shared(rows), results, weights).view_as(x)


def _panels(codes: Tensor, scales: Tensor) -> Tensor:
    return torch.from_numpy(pack_int4(codes.numpy(), scales.numpy()))


def suits(config: ModelConfig, spec: QuantSpec) -> bool:
    """Whether the runtime has operations for such a model, and this machine the runtime."""
    sizes = [config.hidden_size, config.ffn_size, config.head_dim]
    if config.moe is not None:
        sizes += [config.moe.expert_size, config.moe.shared_size]
        if spec.expert_axis != "input":
            return False
    if spec.weight_bits != 4 or spec.group_size != GROUP or spec.activation_bits != 8 or any(size % GROUP for size in sizes):
        return False
    try:
        library()
    except RuntimeLibraryError:
        return False
    return config.head_dim <= 512


@torch.no_grad()
def use_runtime_arithmetic(model: Decoder) -> None:
    """Change a model prepared for QAT, in place and for good; call it before `quant.apply.freeze`, which forgets scales."""
    for name in quantized_weights(model):
        owner, _, weight = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, FakeQuantLinear):
            module.__class__ = ExactLinear
            cast(ExactLinear, module).panels = _panels(*convert_weight(model, name))
        elif isinstance(module, FakeQuantExperts | ExactExperts):
            module.__class__ = ExactExperts
            of_each = zip(*convert_weight(model, name), strict=True)
            setattr(module, f"{weight}_panels", [_panels(codes, scales) for codes, scales in of_each])
    swaps: dict[type[nn.Module], type[nn.Module]] = {
        RMSNorm: ExactRMSNorm, FeedForward: ExactFeedForward, Attention: ExactAttention, MoE: ExactMoE,
    }  # fmt: skip
    for part in model.modules():
        if type(part) in swaps:
            part.__class__ = swaps[type(part)]
        if isinstance(part, ExactAttention):
            part.window = model.config.window
