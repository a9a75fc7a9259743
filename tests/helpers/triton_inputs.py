"""What the tests and the benchmark of Triton kernels share: random inputs, experts of four bits, and how close is close."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton.packed import GROUP, Axis, PackedExperts, pack_experts

TYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of the largest value of a result that is summed in fp32 and rounded to the type once: one unit in its last place."""


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def draw_ids(*shape: int, below: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """int64 in 0..below-1."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def draw_experts(
    experts: int, inputs: int, outputs: int, axis: Axis, *, seed: int = 0, scales: Tensor | None = None
) -> PackedExperts:
    """Experts with all sixteen codes, and scales that make weights of about 0.02 or are given."""
    rows, length = (outputs, inputs) if axis == "input" else (inputs, outputs)
    codes = draw_ids(experts, rows, length, below=16, seed=seed).to(torch.int8) - 8
    if scales is None:
        scales = (0.003 + 0.002 * draw(experts, rows, length // GROUP, seed=seed + 1).abs()).half()
    return pack_experts(codes, scales.expand(experts, rows, length // GROUP), axis)


def assert_rounded(got: Tensor, want: Tensor, dtype: torch.dtype, *, ulps: float = 1.0) -> None:
    """`got` is the fp32 `want` but for sums in another order and `ulps` roundings to `dtype`."""
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.float().cpu(), want.cpu(), rtol=0.0, atol=ulps * ROUNDING[dtype] * largest)
