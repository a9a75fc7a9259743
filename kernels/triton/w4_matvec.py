"""One row times the matrix of one expert, for every (token, expert): the path of decoding. Nothing is sorted.

A decoded token reads each weight of its experts once and multiplies it once, so all that counts is to read at the speed of the
memory: one program takes some outputs of one pair, and no tensor core is used. The arithmetic is that of `w4_grouped`, except
that weights are not rounded to the type of the rows: products are made in fp32.

Letters: P pairs, R rows, E experts, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.backend import check_tensors, narrow, tl, triton
from kernels.triton.packed import PackedExperts
from kernels.triton.w4_grouped import check_w4


@dataclass(frozen=True, kw_only=True)
class MatvecBlocks:
    """Powers of two; not tuned on a GPU."""

    outputs: int = 16
    """Outputs a program where groups lie along the input; pairs of groups (64 outputs) are `pairs` where along the output."""
    pairs: int = 4
    """Pairs of groups (64 codes, 32 bytes) of a row at once."""
    inputs: int = 32
    """Inputs a step where groups lie along the output."""
    warps: int = 4


def matvec_w4(
    x: Tensor,
    weight: PackedExperts,
    experts: Tensor,
    *,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: MatvecBlocks | None = None,
) -> Tensor:
    """[P, N]: for each pair p, row `p // (P / R)` of `x` times the matrix of `experts[p]`. No gradient.

    Args:
        x: [R, K] as in `grouped_w4`; R divides P, so that a token's row serves its k experts.
        experts: int32 or int64 [P]; a pair with an expert outside 0..E-1 gives zeros.
        scales: fp32 [R], of INT8 rows.
        dtype: of the result; the type of `x`, or fp32 for INT8 rows, where None.
    """
    check_w4(x, weight, scales)
    check_tensors(x=x, codes=weight.codes, experts=experts)
    pairs = len(experts)
    result = x.new_empty(pairs, weight.outputs, dtype=dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype))
    if not result.numel():
        return result
    if not len(x) or pairs % len(x):
        raise ValueError(f"{pairs} pairs cannot be shared equally by {len(x)} rows")
    blocks = blocks or MatvecBlocks()
    x, experts = x.contiguous(), experts.contiguous()
    tensors = (x, x if scales is None else scales, experts, weight.codes, weight.scales, result)
    sizes = (weight.inputs, weight.outputs, pairs // len(x))
    shared = {"INT8": x.dtype == torch.int8, "EXPERTS": weight.experts, "PAIRS": blocks.pairs, "num_warps": blocks.warps}
    if weight.axis == "input":
        grid = (triton.cdiv(weight.outputs, blocks.outputs), pairs)
        _pairs_by_input[grid](*tensors, *sizes, BLOCK_N=blocks.outputs, **shared)
    else:
        grid = (triton.cdiv(weight.outputs, 64 * blocks.pairs), pairs)
        _pairs_by_output[grid](*tensors, *sizes, BLOCK_K=blocks.inputs, **shared)
    return result


@triton.jit
def _pairs_by_input(
    x_ptr, x_scales_ptr, experts_ptr, codes_ptr, scales_ptr, y_ptr, inputs, outputs, share,
    INT8: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(experts_ptr + p).to(tl.int64)
    here = (n < outputs) & (expert >= 0) & (expert < EXPERTS)
    x_row = p // share
    groups = inputs // 32
    pairs = (groups + 1) // 2
    line = expert * outputs + n
    inside = tl.arange(0, 32)
    total = tl.zeros((BLOCK_N, PAIRS), tl.float32)
    for start in range(0, pairs, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        first, second = pair < pairs, 2 * pair + 1 < groups
        codes_at = codes_ptr + line[:, None, None] * (pairs * 32) + pair[None, :, None] * 32 + inside[None, None, :]
        both = tl.load(codes_at, mask=here[:, None, None] & first[None, :, None], other=0)
        x_at = x_ptr + x_row.to(tl.int64) * inputs + pair[:, None] * 64 + inside[None, :]
        x_low = tl.load(x_at, mask=first[:, None], other=0)
        x_high = tl.load(x_at + 32, mask=second[:, None], other=0)
        scales_at = scales_ptr + line[:, None] * groups + 2 * pair[None, :]
        s_low = tl.load(scales_at, mask=here[:, None] & first[None, :], other=0.0).to(tl.float32)
        s_high = tl.load(scales_at + 1, mask=here[:, None] & second[None, :], other=0.0).to(tl.float32)
        total += _group_sums(both & 15, x_low, INT8) * s_low + _group_sums(both >> 4, x_high, INT8) * s_high
    y = tl.sum(total, 1)
    if INT8:
        y *= tl.load(x_scales_ptr + x_row)
    tl.store(y_ptr + p.to(tl.int64) * outputs + n, narrow(y, y_ptr.dtype.element_ty), mask=n < outputs)


@triton.jit
def _group_sums(nibbles, x, INT8: tl.constexpr):
    """fp32 [N, PAIRS]: the products of codes [N, PAIRS, 32] and x [PAIRS, 32], summed over a group; exact for INT8."""
    if INT8:
        return tl.sum((nibbles.to(tl.int32) - 8) * x.to(tl.int32)[None, :, :], 2).to(tl.float32)
    return tl.sum((nibbles.to(tl.float32) - 8.0) * x.to(tl.float32)[None, :, :], 2)


@triton.jit
def _pairs_by_output(
    x_ptr, x_scales_ptr, experts_ptr, codes_ptr, scales_ptr, y_ptr, inputs, outputs, share,
    INT8: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(1)
    expert = tl.load(experts_ptr + p).to(tl.int64)
    known = (expert >= 0) & (expert < EXPERTS)
    x_row = p // share
    groups = outputs // 32
    pairs = (groups + 1) // 2
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = tl.arange(0, 32)
    low = tl.zeros((BLOCK_K, PAIRS, 32), tl.float32)
    high = tl.zeros((BLOCK_K, PAIRS, 32), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = (k < inputs) & known
        line = expert * inputs + k
        codes_at = codes_ptr + line[:, None, None] * (pairs * 32) + pair[None, :, None] * 32 + inside[None, None, :]
        both = tl.load(codes_at, mask=here[:, None, None] & (pair < pairs)[None, :, None], other=0)
        scales_at = scales_ptr + line[:, None] * groups + 2 * pair[None, :]
        s_low = tl.load(scales_at, mask=here[:, None] & (2 * pair < groups)[None, :], other=0.0).to(tl.float32)
        s_high = tl.load(scales_at + 1, mask=here[:, None] & (2 * pair + 1 < groups)[None, :], other=0.0).to(tl.float32)
        x = tl.load(x_ptr + x_row.to(tl.int64) * inputs + k, mask=here, other=0).to(tl.float32)[:, None]
        # Summed over inputs once, at the end: within the loop every thread adds to sums of its own.
        low += ((both & 15).to(tl.float32) - 8.0) * (s_low * x)[:, :, None]
        high += ((both >> 4).to(tl.float32) - 8.0) * (s_high * x)[:, :, None]
    y_low, y_high = tl.sum(low, 0), tl.sum(high, 0)
    if INT8:
        scale = tl.load(x_scales_ptr + x_row)
        y_low, y_high = y_low * scale, y_high * scale
    n = pair[:, None] * 64 + inside[None, :]
    y_at = y_ptr + p.to(tl.int64) * outputs + n
    tl.store(y_at, narrow(y_low, y_ptr.dtype.element_ty), mask=n < outputs)
    tl.store(y_at + 32, narrow(y_high, y_ptr.dtype.element_ty), mask=n + 32 < outputs)
