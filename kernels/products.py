"""fp32 matrix products on a CPU, through oneDNN where torch would take MKL and MKL holds back.

On CPUs that are not Intel's MKL leaves the AVX-512 units half used: on an EPYC it runs 71 to 97 GFLOP/s a core where oneDNN,
which torch carries too, runs 102 to 110 (docs/log.md). The operator is the one that torch's own compiler emits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 64
"""Below it, as in decoding, setting up the primitive costs more than it saves."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear(x, weight)` with its gradient, by the faster of the two libraries: x [..., K], weight [N, K]."""
    if not onednn_suits(x, weight) or x.numel() < FEWEST_ROWS * x.shape[-1]:
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` without a gradient: x [M, K], weight [N, K]; either may be a transposed view."""
    return onednn_product(x, weight) if onednn_suits(x, weight) and len(x) >= FEWEST_ROWS else x @ weight.T


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = onednn_product(grad, weight.T) if ctx.needs_input_grad[0] else None
        # Here the libraries are level, and MKL needs no copy of the transposed sides.
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` of these goes through oneDNN, given rows enough."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu and _onednn_is_faster()


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """`product` by oneDNN, for what `onednn_suits`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@cache
def _onednn_is_faster() -> bool:
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        vendor = Path("/proc/cpuinfo").read_text().partition("vendor_id")[2].partition("\n")[0]
    except OSError:
        return False
    return "AuthenticAMD" in vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
