"""Products of rows with the matrix of the expert that each belongs to, all experts in one operation.

Rows come sorted by expert. `grouped_linear_loop` is the specification: what a loop over experts computes. Its gradient
makes, for each expert, a tensor of zeros as large as all experts together; the operation writes each expert's part of the
gradient once, into memory that is allocated once.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.products import onednn_product, onednn_suits

ONEDNN_WEIGHTS = 1 << 18
FEWEST_ROWS = 8
"""From so many weights and rows an expert on, oneDNN's better use of the machine outweighs setting up its primitive."""


def grouped_linear_loop(rows: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """`rows[i] @ weight[expert of i]`, the plain way: see `grouped_linear`."""
    experts = len(weight)
    sizes = [len(rows) // experts] * experts if counts is None else counts.tolist()
    parts = [part @ weight[expert] for expert, part in enumerate(rows.split(sizes))]
    return torch.cat(parts)


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor | None = None) -> Tensor:
    """`rows[i] @ weight[expert of i]` with its gradient, [R, N].

    Args:
        rows: [R, K], sorted by expert.
        weight: [E, K, N], inputs first.
        counts: int64 [E], rows of each expert, adding up to R; None is as many for each.

    Raises ValueError where the rows cannot be shared out so.
    """
    if counts is None:
        if len(rows) % len(weight):
            raise ValueError(f"{len(rows)} rows cannot be shared equally by {len(weight)} experts")
        return torch.bmm(rows.view(len(weight), -1, rows.shape[-1]), weight).flatten(0, 1)
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if rows.is_cuda and (triton := _triton()) is not None:
        on_gpu: Tensor = triton.grouped_linear(rows, weight, counts)
        return on_gpu
    sizes = counts.tolist()
    if sum(sizes) != len(rows):
        raise ValueError(f"the counts of {len(weight)} experts add up to {sum(sizes)} rows, {len(rows)} were given")
    result = _Grouped.apply(rows, weight, sizes)
    return result


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        return _multiply(rows, weight, sizes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_rows = _multiply(grad, weight.transpose(1, 2), ctx.sizes) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            # An expert without rows gets zeros: a product over no rows at all.
            for x, g, out in zip(rows.split(ctx.sizes), grad.split(ctx.sizes), grad_weight.unbind(), strict=True):
                torch.mm(x.T, g, out=out)
        return grad_rows, grad_weight, None


def _multiply(rows: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
    result = rows.new_empty(len(rows), weight.shape[-1])
    onednn = weight[0].numel() >= ONEDNN_WEIGHTS and onednn_suits(rows, weight)
    for x, w, out in zip(rows.split(sizes), weight.unbind(), result.split(sizes), strict=True):
        if onednn and len(x) >= FEWEST_ROWS:
            out.copy_(onednn_product(x, w.T))
        else:
            torch.mm(x, w, out=out)
    return result


@cache
def _triton() -> ModuleType | None:
    """Our Triton kernels, where triton is installed."""
    try:
        from kernels.triton import grouped_gemm
    except ImportError:
        return None
    return grouped_gemm
