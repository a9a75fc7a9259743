"""The three modules with weights, and RoPE as pure functions.

`Linear` and `Embedding` are types of their own so that `quant/` can find them; both say in `head_operands` what the
logits are a product of, so that a loss can multiply chunk by chunk and a quantizer can round both sides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.products import linear
from modeling.config import RopeScaling


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32 and not torch.compiler.is_compiling():
            return _RMSNormCPU.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class _RMSNormCPU(torch.autograd.Function):
    """`F.rms_norm` in a third of its time: on a CPU torch composes it, and its gradient, from some fifteen passes.

    With s = rsqrt(mean(x^2) + eps), y = x s w; dx = s (g w - x s mean(g w x s)), dw = sum over tokens of g x s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        grad, scale = grad_outputs[0].reshape(-1, size), scale.reshape(-1, 1)
        normed = x.reshape(-1, size) * scale
        product = grad * normed
        mean = (product @ weight).unsqueeze(1) / size
        grad_x = (grad * weight).sub_(normed.mul_(mean)).mul_(scale)
        return grad_x.view_as(x), product.sum(0), None


class Linear(nn.Linear):
    """y = x W^T, without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(x, W) of an untied head: logits are x @ W.T."""
        return hidden, self.weight


class Embedding(nn.Embedding):
    """Token id to vector; the same table is the head where the model ties them."""

    def head_operands(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(x, W) of a tied head: logits are x @ W.T."""
        return hidden, self.weight


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians a position of every pair, fp32 [head_dim / 2]: theta^(-2i / head_dim), slowed down where `scaling` says so."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    width = max(scaling.high_frequency - scaling.low_frequency, torch.finfo(torch.float32).tiny)  # 0 blends nothing
    kept = ((turns - scaling.low_frequency) / width).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and signed sin of RoPE's angles, [..., head_dim], for the split-half layout (Su et al., arXiv 2104.09864).

    Angles are fp32 whatever `dtype` is: at 128k positions bf16 would not tell neighbours apart. Their sine and cosine are
    taken in double precision, so that every machine rounds them alike.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies.to(positions.device)
    cos, sin = angles.double().cos(), angles.double().sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of x [..., head_dim]; `sin` carries the sign of the first half."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
