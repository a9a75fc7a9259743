"""Rows sorted by expert times weights of four bits, in tiles on tensor cores: the path of prompts and batches.

With real activations (W4A16) a weight is code times scale, rounded to the type of the rows; sums are fp32. With INT8 rows
(W4A8) and groups along the input, the products of a group are summed exactly in int32, then scaled: the integers of the
packed runtime. With groups along the output every input has a scale of its own and there are no integers to sum: INT8
rows go, exactly, into fp16 and are multiplied with weights rounded to fp16.

Letters: R rows, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.triton.backend import PRODUCT_TYPES, TL_TYPES, check_tensors, multiply, narrow, precision, tl, triton
from kernels.triton.blocks import Blocks, four_bit_blocks
from kernels.triton.packed import GROUP, PackedExperts
from kernels.triton.schedule import find_tile, swizzle, tile_schedule


def grouped_w4(
    x: Tensor,
    weight: PackedExperts,
    counts: Tensor,
    *,
    scales: Tensor | None = None,
    index: Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """[R, N]: row r of `x` times the matrix of its expert; rows beyond the sum of `counts` give zeros. No gradient.

    Args:
        x: [R, K]: bf16, fp16 or fp32 (W4A16), or the codes of `quantize_rows` (W4A8).
        counts: int32 or int64 [E], rows of each expert in their order.
        scales: fp32 [R], of INT8 rows.
        index: int64 [R']: row r is `x[index[r]]` (and so is its scale), or zeros where the index is R or more.
        dtype: of the result; the type of `x`, or fp32 for INT8 rows, where None.
        blocks: None takes them from the table. `depth` is for groups along the output; along the input a step is a pair.
    """
    check_w4(x, weight, scales)
    check_tensors(x=x, codes=weight.codes, counts=counts)
    rows = len(x) if index is None else len(index)
    compute = torch.float16 if x.dtype == torch.int8 else x.dtype
    result = x.new_empty(rows, weight.outputs, dtype=dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype))
    if not result.numel():
        return result
    chosen = blocks or four_bit_blocks(x.dtype, rows, weight.experts)
    schedule = tile_schedule(counts, rows, chosen.rows)
    shared: dict[str, Any] = {
        "INT8": x.dtype == torch.int8, "INDEXED": index is not None, "EXPERTS": schedule.experts,
        "EXPERT_BLOCK": schedule.expert_block, "BLOCK_R": chosen.rows, "BLOCK_N": chosen.cols, "GROUP": chosen.group,
        "COMPUTE": TL_TYPES[compute], "PRECISION": precision(compute),
        "num_warps": chosen.warps, "num_stages": chosen.stages,
    }  # fmt: skip
    x = x.contiguous()
    tensors = (x, x if scales is None else scales, x if index is None else index, weight.codes, weight.scales, result)
    sizes = (schedule.bounds, len(x), weight.inputs, weight.outputs, schedule.most_tiles)
    grid = (schedule.most_tiles * triton.cdiv(weight.outputs, chosen.cols),)
    if weight.axis == "input":
        _tiles_by_input[grid](*tensors, *sizes, **shared)
    else:
        if chosen.cols < 2 * GROUP:
            raise ValueError(f"blocks.cols={chosen.cols}; a tile of output groups is 64 wide or more")
        _tiles_by_output[grid](*tensors, *sizes, BLOCK_K=chosen.depth, **shared)
    return result


def check_w4(x: Tensor, weight: PackedExperts, scales: Tensor | None) -> None:
    """Raise ValueError unless rows [R, K] fit the weight and have scales exactly where they are INT8."""
    if x.ndim != 2 or x.shape[1] != weight.inputs:
        raise ValueError(f"rows {list(x.shape)}; expected [R, {weight.inputs}] for these experts")
    if x.dtype != torch.int8 and x.dtype not in PRODUCT_TYPES:
        raise ValueError(f"rows are {x.dtype}; expected bf16, fp16, fp32, or int8 with scales")
    if (scales is None) == (x.dtype == torch.int8) or (scales is not None and scales.shape != x.shape[:1]):
        found = "no scales" if scales is None else f"scales {list(scales.shape)}"
        raise ValueError(f"rows are {x.dtype} with {found}; INT8 rows need fp32 [{len(x)}], others none")


@triton.jit
def load_rows(index_ptr, first, end, num_rows, BLOCK_R: tl.constexpr, INDEXED: tl.constexpr):
    """Where a tile's rows are stored, which of x they are, and whether there is such a row."""
    row = first + tl.arange(0, BLOCK_R)
    at = row.to(tl.int64)
    if INDEXED:
        at = tl.load(index_ptr + row, mask=row < end, other=num_rows).to(tl.int64)
    return row, at, (row < end) & (at < num_rows)


@triton.jit
def _tiles_by_input(
    x_ptr, x_scales_ptr, index_ptr, codes_ptr, scales_ptr, y_ptr, bounds_ptr, num_rows, inputs, outputs, tiles,
    INT8: tl.constexpr, INDEXED: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, col_tile = swizzle(tl.program_id(0), tiles, tl.cdiv(outputs, BLOCK_N), GROUP)
    expert, first, end = find_tile(bounds_ptr, tile, EXPERTS, EXPERT_BLOCK, BLOCK_R)
    if expert > EXPERTS:
        return
    row, x_row, here = load_rows(index_ptr, first, end, num_rows, BLOCK_R, INDEXED)
    n = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = inputs // 32
    pairs = (groups + 1) // 2
    inside = tl.arange(0, 32)
    line = expert.to(tl.int64) * outputs + n % outputs  # columns outside are loaded from inside and not stored
    x_at = x_ptr + x_row[:, None] * inputs + inside[None, :]
    codes_at = codes_ptr + line[None, :] * (pairs * 32) + inside[:, None]
    scales_at = scales_ptr + line * groups
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for pair in range(0, tl.where(expert < EXPERTS, pairs, 0)):
        both = tl.load(codes_at)
        # The second half of an odd last pair is not there.
        second = 2 * pair + 1 < groups
        x_low = tl.load(x_at, mask=here[:, None], other=0)
        x_high = tl.load(x_at + 32, mask=here[:, None] & second, other=0)
        s_low = tl.load(scales_at).to(tl.float32)[None, :]
        s_high = tl.load(scales_at + 1, mask=(n >= 0) & second, other=0.0).to(tl.float32)[None, :]
        low = (both & 15).to(tl.int8) - 8
        high = (both >> 4).to(tl.int8) - 8
        if INT8:
            total += tl.dot(x_low, low.to(tl.int8), out_dtype=tl.int32).to(tl.float32) * s_low
            total += tl.dot(x_high, high.to(tl.int8), out_dtype=tl.int32).to(tl.float32) * s_high
        else:
            w_low = narrow(low.to(tl.float32) * s_low, COMPUTE)
            w_high = narrow(high.to(tl.float32) * s_high, COMPUTE)
            total = multiply(x_low, w_low, total, PRECISION)
            total = multiply(x_high, w_high, total, PRECISION)
        x_at += 64
        codes_at += 32
        scales_at += 2
    if INT8:
        total *= tl.load(x_scales_ptr + x_row, mask=here, other=0.0)[:, None]
    y_at = y_ptr + row.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y_at, narrow(total, y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (n < outputs)[None, :])


@triton.jit
def _tiles_by_output(
    x_ptr, x_scales_ptr, index_ptr, codes_ptr, scales_ptr, y_ptr, bounds_ptr, num_rows, inputs, outputs, tiles,
    INT8: tl.constexpr, INDEXED: tl.constexpr, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_N // 64
    tile, col_tile = swizzle(tl.program_id(0), tiles, tl.cdiv(outputs, BLOCK_N), GROUP)
    expert, first, end = find_tile(bounds_ptr, tile, EXPERTS, EXPERT_BLOCK, BLOCK_R)
    if expert > EXPERTS:
        return
    row, x_row, here = load_rows(index_ptr, first, end, num_rows, BLOCK_R, INDEXED)
    groups = outputs // 32
    pairs = (groups + 1) // 2
    pair = col_tile * PAIRS + tl.arange(0, PAIRS)
    byte = col_tile * (PAIRS * 32) + tl.arange(0, PAIRS * 32)
    depth = tl.arange(0, BLOCK_K)
    low = tl.zeros((BLOCK_R, PAIRS * 32), tl.float32)
    high = tl.zeros((BLOCK_R, PAIRS * 32), tl.float32)
    for start in range(0, tl.where(expert < EXPERTS, inputs, 0), BLOCK_K):
        k = start + depth
        line = expert.to(tl.int64) * inputs + k
        x = tl.load(x_ptr + x_row[:, None] * inputs + k[None, :], mask=here[:, None] & (k < inputs)[None, :], other=0)
        codes_at = codes_ptr + line[:, None] * (pairs * 32) + byte[None, :]
        both = tl.load(codes_at, mask=(k < inputs)[:, None] & (byte < pairs * 32)[None, :], other=0)
        scales_at = scales_ptr + line[:, None] * groups + 2 * pair[None, :]
        s_low = tl.load(scales_at, mask=(k < inputs)[:, None] & (2 * pair < groups)[None, :], other=0.0)
        s_high = tl.load(scales_at + 1, mask=(k < inputs)[:, None] & (2 * pair + 1 < groups)[None, :], other=0.0)
        w_low = narrow(_scaled((both & 15).to(tl.int8) - 8, s_low, BLOCK_K, PAIRS), COMPUTE)
        w_high = narrow(_scaled((both >> 4).to(tl.int8) - 8, s_high, BLOCK_K, PAIRS), COMPUTE)
        low = multiply(x.to(COMPUTE), w_low, low, PRECISION)
        high = multiply(x.to(COMPUTE), w_high, high, PRECISION)
    if INT8:
        scale = tl.load(x_scales_ptr + x_row, mask=here, other=0.0)[:, None]
        low, high = low * scale, high * scale
    n = byte // 32 * 64 + byte % 32
    y_at = y_ptr + row.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(y_at, narrow(low, y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (n < outputs)[None, :])
    tl.store(y_at + 32, narrow(high, y_ptr.dtype.element_ty), mask=(row < end)[:, None] & (n + 32 < outputs)[None, :])


@triton.jit
def _scaled(codes, scales, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """fp32 [ROWS, PAIRS * 32]: codes times the scale of their group [ROWS, PAIRS]."""
    values = tl.reshape(codes, (ROWS, PAIRS, 32)).to(tl.float32) * scales.to(tl.float32)[:, :, None]
    return tl.reshape(values, (ROWS, PAIRS * 32))
