"""Min-max fake quantization: the forward pass sees rounded values, the gradient passes straight through.

    Q(w) = scale(w) * clamp(round(w / scale(w)), low, high)        dL/dw = dL/dQ(w)

The gradient is the plain straight-through estimator (Bengio et al. 2013, arXiv 1308.3432), without a mask at the
clipped end: with this scale rule the largest positive weight of EVERY group is clamped (7.5 to 7 at 4 bits), and a mask
would stop just those weights from learning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant.primitives import round_activations, round_to_grid
from quant.spec import QuantSpec


class _StraightThrough(torch.autograd.Function):
    """Replaces `x` by `rounded` in the forward pass; `x + (rounded - x).detach()` would not be exact in floats."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


def fake_quantize_weight(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Weight rows [rows, in] on their grid, in the weight's dtype. Rows are independent of each other."""
    return _straight_through(weight, round_to_grid(weight.detach(), spec))


def fake_quantize_activations(x: Tensor, spec: QuantSpec) -> Tensor:
    """Activations [..., D] on their int8 grid, one scale a token; unchanged where the spec leaves them at 16 bits."""
    if spec.activation_bits == 16:
        return x
    return _straight_through(x, round_activations(x.detach(), spec.activation_bits))


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    rounded = rounded.to(x.dtype)
    return _StraightThrough.apply(x, rounded) if torch.is_grad_enabled() and x.requires_grad else rounded
