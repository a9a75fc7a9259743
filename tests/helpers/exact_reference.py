"""The runtime's arithmetic restated in PyTorch, on the weights of a model prepared for QAT: slow, and equal to the last bit.

A plain fp32 forward pass adds in another order, and each difference of 1e-7 may tip an activation to the next of its 255
codes; so even one fake-quantized model in fp32 and in fp64 differ by more than 1e-3 of the largest logit (docs/runtime.md).
With the order fixed as `kernels/cpu/src/float_ops.h` fixes it, nothing tips, and equality can be asked for.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.decoder import Decoder
from quant.apply import convert
from quant.primitives import quantize_activations

LANES = 16


def fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """a b + c rounded once: a product of two floats is exact in double precision."""
    a = a.double() if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float32).double()
    return (a * b.double() + c.double()).float()


def tree_sum(lanes: Tensor) -> Tensor:
    """Sum over the last dimension of 16 lanes: halves are added until one is left."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def square_root(x: Tensor) -> Tensor:
    """Rounded to nearest, which torch's own is not where MKL computes it."""
    return torch.as_tensor(np.sqrt(x.numpy()))


def exponential(x: Tensor) -> Tensor:
    x = x.clamp(-87.0, 88.0)
    n = (x * torch.tensor(1.44269504)).round()
    r = fma(2.12194440e-4, n, fma(-0.693359375, n, x))
    p = torch.full_like(x, 1 / 5040)
    for factorial in (720, 120, 24, 6, 2, 1, 1):
        p = fma(p, r, torch.full_like(x, 1 / factorial))
    return torch.ldexp(p, n)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    acc = torch.zeros(*x.shape[:-1], LANES)
    for part in x.split(LANES, -1):
        acc = fma(part, part, acc)
    scale = 1.0 / square_root(tree_sum(acc) / float(x.shape[-1]) + torch.tensor(eps, dtype=torch.float32))
    return x * scale if weight is None else x * scale * weight


class ExactModel:
    """Logits [T, V] of one row of tokens."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.config = model, model.config
        self.codes = {name.removesuffix(".weight"): (codes.float(), scales.float())
                      for name, (codes, scales) in convert(model).items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        codes, scales = self.codes[name]
        x_codes, x_scales = quantize_activations(x)
        total = torch.zeros(len(x), len(codes))
        for g, (a, w) in enumerate(zip(x_codes.float().split(32, 1), codes.split(32, 1), strict=True)):
            total = fma(a @ w.T, scales[:, g], total)  # the product's sums are integers below 2^24: exact in any order
        return total * x_scales

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
                gate, up = (self.linear(f"{name}.feed_forward.{part}", h) for part in ("gate", "up"))
                x = x + self.linear(f"{name}.feed_forward.down", gate / (1.0 + exponential(-gate)) * up)
        x = rms_norm(x, self.model.norm.weight, c.norm_eps)
        return self.linear("embed" if c.tie_embeddings else "head", x)

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
