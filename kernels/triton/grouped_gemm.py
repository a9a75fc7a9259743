"""Products of rows with the matrix of the expert that each belongs to, forward and backward, for a GPU.

    y[r] = x[r] @ W[e(r)]        dx[r] = dy[r] @ W[e(r)]^T        dW[e] = x_e^T dy_e

Sums are made in fp32 whatever the type. Every element of a result is summed by one program in a fixed order and written
once: no atomics, the same bits every time. `kernels.grouped.grouped_linear_loop` is the specification.

Letters: R rows, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton.backend import PRODUCT_TYPES, check_tensors, multiply, narrow, precision, tl, triton
from kernels.triton.blocks import Blocks, product_blocks, weight_grad_blocks
from kernels.triton.schedule import TileSchedule, find_tile, swizzle, tile_schedule


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor, *, blocks: Blocks | None = None) -> Tensor:
    """[R, N]: `rows[i] @ weight[expert of i]` with its gradients; nothing waits for the device.

    Args:
        rows: [R, K], sorted by expert; bf16, fp16 or fp32.
        weight: [E, K, N] of the same type, inputs first.
        counts: int32 or int64 [E], rows of each expert, zero allowed. Rows beyond their sum give zeros and get no gradient.
        blocks: tiles of all three products; None takes them from the tables.

    Under autocast both sides are rounded to its type. Raises ValueError for shapes, types or devices that do not fit.
    """
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    _check(rows, weight, counts)
    result: Tensor = _GroupedLinear.apply(rows, weight, counts, blocks)
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: Tensor, blocks: Blocks | None) -> Tensor:
        chosen = blocks or product_blocks(rows.dtype, len(rows), len(weight), rows.device)
        schedule = tile_schedule(counts, len(rows), chosen.rows)
        ctx.save_for_backward(rows, weight)
        ctx.schedule, ctx.chosen, ctx.blocks = schedule, chosen, blocks
        return _multiply(rows, weight, schedule, chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        # The transposed weight is a view: the kernel takes any strides, a tensor core either order.
        grad_rows = _multiply(grad, weight.transpose(1, 2), ctx.schedule, ctx.chosen) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            blocks = ctx.blocks or weight_grad_blocks(rows.dtype, rows.device)
            grad_weight = _multiply_transposed(rows, grad, ctx.schedule, blocks)
        return grad_rows, grad_weight, None, None


def _check(rows: Tensor, weight: Tensor, counts: Tensor) -> None:
    if rows.ndim != 2 or weight.ndim != 3 or rows.shape[1] != weight.shape[1]:
        raise ValueError(f"rows {list(rows.shape)} and weight {list(weight.shape)}; expected [R, K] and [E, K, N]")
    if counts.shape != weight.shape[:1] or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"counts {counts.dtype} {list(counts.shape)}; expected int32 or int64 [{len(weight)}]")
    if rows.dtype != weight.dtype or rows.dtype not in PRODUCT_TYPES:
        raise ValueError(f"rows are {rows.dtype}, weight is {weight.dtype}; expected one of bf16, fp16 and fp32 for both")
    check_tensors(rows=rows, weight=weight, counts=counts)


def _multiply(rows: Tensor, weight: Tensor, schedule: TileSchedule, blocks: Blocks) -> Tensor:
    """[R, N] of rows [R, K] and weight [E, K, N] of any strides."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (num_rows, inputs), outputs = rows.shape, weight.shape[2]
    result = rows.new_empty(num_rows, outputs)
    tiles, cols = schedule.most_tiles, triton.cdiv(outputs, blocks.cols)
    if result.numel():
        _grouped_kernel[(tiles * cols,)](
            rows, weight, result, schedule.bounds, num_rows, inputs, outputs, tiles, rows.stride(0), *weight.stride(),
            EXPERTS=schedule.experts, EXPERT_BLOCK=schedule.expert_block,
            BLOCK_R=blocks.rows, BLOCK_N=blocks.cols, BLOCK_K=blocks.depth, GROUP=blocks.group,
            WHOLE_K=inputs % blocks.depth == 0, PRECISION=precision(rows.dtype),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return result


def _multiply_transposed(rows: Tensor, grad: Tensor, schedule: TileSchedule, blocks: Blocks) -> Tensor:
    """[E, K, N]: for each expert its rows [R, K], transposed, times their gradients [R, N]."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    inputs, outputs = rows.shape[1], grad.shape[1]
    result = rows.new_empty(schedule.experts, inputs, outputs)
    tiles = triton.cdiv(inputs, blocks.rows) * triton.cdiv(outputs, blocks.cols)
    if result.numel():
        _weight_grad_kernel[(tiles, schedule.experts)](
            rows, grad, result, schedule.bounds, inputs, outputs, rows.stride(0), grad.stride(0),
            EXPERTS=schedule.experts, BLOCK_K=blocks.rows, BLOCK_N=blocks.cols, BLOCK_R=blocks.depth,
            PRECISION=precision(rows.dtype),
            num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
    return result


@triton.jit
def _grouped_kernel(
    x_ptr, w_ptr, y_ptr, bounds_ptr, num_rows, inputs, outputs, tiles, x_row, w_expert, w_in, w_out,
    EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WHOLE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, col_tile = swizzle(tl.program_id(0), tiles, tl.cdiv(outputs, BLOCK_N), GROUP)
    expert, first, end = find_tile(bounds_ptr, tile, EXPERTS, EXPERT_BLOCK, BLOCK_R)
    if expert > EXPERTS:
        return
    row = first + tl.arange(0, BLOCK_R)
    col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows and columns outside are loaded from inside and not stored: a tile without a mask is loaded in whole vectors.
    x_at = x_ptr + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * x_row + depth[None, :]
    w_at = w_ptr + expert.to(tl.int64) * w_expert + depth[:, None] * w_in + (col % outputs)[None, :] * w_out
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    # Rows that are nobody's have nothing to sum.
    for step in range(0, tl.where(expert < EXPERTS, tl.cdiv(inputs, BLOCK_K), 0)):
        if WHOLE_K:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            x = tl.load(x_at, mask=depth[None, :] < inputs - step * BLOCK_K, other=0.0)
            w = tl.load(w_at, mask=depth[:, None] < inputs - step * BLOCK_K, other=0.0)
        total = multiply(x, w, total, PRECISION)
        x_at += BLOCK_K
        w_at += BLOCK_K * w_in
    y_at = y_ptr + row.to(tl.int64)[:, None] * outputs + col[None, :]
    tl.store(y_at, narrow(total, y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (col < outputs)[None, :])


@triton.jit
def _weight_grad_kernel(
    x_ptr, g_ptr, w_ptr, bounds_ptr, inputs, outputs, x_row, g_row,
    EXPERTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    cols = tl.cdiv(outputs, BLOCK_N)
    k = tl.program_id(0) // cols * BLOCK_K + tl.arange(0, BLOCK_K)
    n = tl.program_id(0) % cols * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(bounds_ptr + expert)
    end = tl.load(bounds_ptr + (EXPERTS + 1) + expert)
    row = first + tl.arange(0, BLOCK_R)
    x_at = x_ptr + row.to(tl.int64)[None, :] * x_row + (k % inputs)[:, None]
    g_at = g_ptr + row.to(tl.int64)[:, None] * g_row + (n % outputs)[None, :]
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_R):
        # The next expert's rows are not part of the sum, and what lies beyond the last may be anything.
        x = tl.load(x_at, mask=(start + tl.arange(0, BLOCK_R) < end)[None, :], other=0.0)
        g = tl.load(g_at, mask=(start + tl.arange(0, BLOCK_R) < end)[:, None], other=0.0)
        total = multiply(x, g, total, PRECISION)
        x_at += BLOCK_R * x_row
        g_at += BLOCK_R * g_row
    w_at = w_ptr + (expert.to(tl.int64) * inputs + k[:, None]) * outputs + n[None, :]
    tl.store(w_at, narrow(total, w_ptr.dtype.element_ty), mask=(k < inputs)[:, None] & (n < outputs)[None, :])
