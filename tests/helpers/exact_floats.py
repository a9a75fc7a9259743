"""The runtime's arithmetic of floats restated in PyTorch: `kernels/cpu/src/float_ops.h` fixes the order, this follows it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

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
