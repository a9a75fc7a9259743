"""The runtime's arithmetic restated in PyTorch, on the weights of a model prepared for QAT: slow, and equal to the last bit.

A plain fp32 forward pass adds in another order, and each difference of 1e-7 may tip an activation to the next of its 255
codes; so even one fake-quantized model in fp32 and in fp64 differ by more than 1e-3 of the largest logit (docs/runtime.md).
With the order fixed as `kernels/cpu/src/float_ops.h` fixes it, nothing tips, and equality can be asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.decoder import Decoder
from modeling.moe_config import MoEConfig
from quant.apply import convert
from quant.primitives import quantize_activations
from tests.helpers import exact_routing
from tests.helpers.exact_floats import LANES, exponential, fma, square_root, tree_sum


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    acc = torch.zeros(*x.shape[:-1], LANES)
    for part in x.split(LANES, -1):
        acc = fma(part, part, acc)
    scale = 1.0 / square_root(tree_sum(acc) / float(x.shape[-1]) + torch.tensor(eps, dtype=torch.float32))
    return x * scale if weight is None else x * scale * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1.0 + exponential(-gate)) * up


def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """[T, rows] of x [T, K] rounded to INT8 a row, with codes [rows, K] and scales [rows, K / 32]."""
    x_codes, x_scales = quantize_activations(x)
    total = torch.zeros(len(x), len(codes))
    for g, (a, w) in enumerate(zip(x_codes.float().split(32, 1), codes.split(32, 1), strict=True)):
        total = fma(a @ w.T, scales[:, g], total)  # the product's sums are integers below 2^24: exact in any order
    return total * x_scales


class ExactModel:
    """Logits [T, V] of one row of tokens."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.config = model, model.config
        self.codes = {name.removesuffix(".weight"): (codes.float(), scales.float())
                      for name, (codes, scales) in convert(model).items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return product(x, *self.codes[name])

    def __call__(self, tokens: Tensor) -> Tensor:
        c = self.config
        codes, scales = self.codes["embed"]
        x = (codes.view(len(codes), -1, 32) * scales[..., None]).view_as(codes)[tokens]
        for index, (block, kind) in enumerate(zip(self.model.blocks, c.attention_kinds, strict=True)):
            for _ in range(c.block_repeat):
                name = f"blocks.{index}"
                if kind != "skip":
                    h = rms_norm(x, block.attention_norm.weight, c.norm_eps)
                    x = x + self.linear(f"{name}.attention.o", self.attention(name, h, c.window if kind == "window" else None))
                h = rms_norm(x, block.feed_forward_norm.weight, c.norm_eps)
                moe = c.moe_at(index)
                x = x + (self.feed_forward(f"{name}.feed_forward", h) if moe is None else self.mixture(name, moe, h))
        x = rms_norm(x, self.model.norm.weight, c.norm_eps)
        return self.linear("embed" if c.tie_embeddings else "head", x)

    def feed_forward(self, name: str, h: Tensor) -> Tensor:
        gate, up = (self.linear(f"{name}.{part}", h) for part in ("gate", "up"))
        return self.linear(f"{name}.down", swiglu(gate, up))

    def mixture(self, name: str, moe: MoEConfig, h: Tensor) -> Tensor:
        """One token after the other, its experts one after the other, ids ascending."""
        router = self.model.get_submodule(f"{name}.feed_forward.router")
        chosen, weights = exact_routing.route(exact_routing.logits(h, router.weight), router.bias, moe)
        shared = f"{name}.feed_forward.shared"
        out = self.feed_forward(shared, h) if moe.shared_size else torch.zeros_like(h)
        for t, (experts, mix) in enumerate(zip(chosen.tolist(), weights, strict=True)):
            for expert, weight in zip(experts, mix, strict=True):
                gate, up = self.expert(f"{name}.feed_forward.experts.gate_up", expert, h[t : t + 1]).chunk(2, -1)
                row = self.expert(f"{name}.feed_forward.experts.down", expert, swiglu(gate, up))
                out[t] = fma(weight, row[0], out[t])
        return out

    def expert(self, name: str, expert: int, x: Tensor) -> Tensor:
        return product(x, *(part[expert] for part in self.codes[name]))

    def attention(self, name: str, h: Tensor, window: int | None) -> Tensor:
        c, length = self.config, len(h)
        q, k, v = (self.linear(f"{name}.attention.{part}", h).view(length, -1, c.head_dim) for part in "qkv")
        q, k = self.rotate(q), self.rotate(k)
        if c.qk_norm:
            q, k = rms_norm(q, None, c.norm_eps), rms_norm(k, None, c.norm_eps)
        k, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for t in (k, v))
        scores = torch.zeros(c.num_heads, length, length)
        for d in range(c.head_dim):
            scores = fma(q[:, :, d].T[:, :, None], k[:, :, d].T[:, None, :], scores)
        scores = scores * (1.0 / square_root(torch.tensor(float(c.head_dim))))
        index = torch.arange(length)
        distance = index[:, None] - index[None]
        seen = (distance >= 0) & (distance < (window or length))
        top = scores.masked_fill(~seen, -1e30).amax(-1, keepdim=True)
        p = torch.where(seen, exponential(scores - top), 0.0)
        lanes = F.pad(p, (0, -length % LANES)).unflatten(-1, (-1, LANES))
        total = torch.zeros(*p.shape[:2], LANES)
        for part in lanes.unbind(-2):
            total = total + part
        out = torch.zeros(c.num_heads, length, c.head_dim)
        for j in range(length):
            out = fma(p[:, :, j, None], v[j][:, None, :], out)
        return (out / tree_sum(total)).transpose(0, 1).reshape(length, -1)

    def rotate(self, x: Tensor) -> Tensor:
        c = self.config
        frequencies = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
        angles = (torch.arange(len(x), dtype=torch.float32)[:, None] * frequencies).double()
        cos, sin = angles.cos().float(), angles.sin().float()
        cos, sin = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        return x * cos + x.roll(c.head_dim // 2, -1) * sin
