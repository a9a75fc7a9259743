"""What happens to whole rows between two products of four bits: SwiGLU, and rounding to INT8 with one scale a row.

Rounding is a kernel of its own, or the end of SwiGLU, and not part of the product: there every tile of columns
would look for the largest of the same row again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton.backend import check_tensors, narrow, tl, triton

LONGEST = 16384
"""A row is held by one program at once; longer ones would spill."""


def quantize_rows(x: Tensor, *, block: int = 1) -> tuple[Tensor, Tensor]:
    """int8 codes [R, D] and fp32 scales [R] of x [R, D]: scale = max|x| / 127, codes rounded half to even.

    Bit for bit `quant.primitives.quantize_activations`: divisions are rounded as IEEE says, not approximated. A row with
    a NaN has scale NaN and codes 0. `block`: rows a program.
    """
    check_tensors(x=x)
    x = x.contiguous()
    _check_length(x.shape[1])
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    if x.numel():
        _quantize_kernel[(triton.cdiv(len(x), block),)](
            x, codes, scales, len(x), x.shape[1], BLOCK_R=block, BLOCK_D=triton.next_power_of_2(x.shape[1])
        )
    return codes, scales


def swiglu_rows(gate_up: Tensor, *, block: int = 1) -> Tensor:
    """silu(gate) * up, [R, F] in the type of gate_up [R, 2 F], whose rows are the gate and then the up half."""
    out, _ = _swiglu(gate_up, int8=False, block=block)
    return out


def swiglu_quantize_rows(gate_up: Tensor, *, block: int = 1) -> tuple[Tensor, Tensor]:
    """`quantize_rows(swiglu_rows(gate_up))` in one pass: int8 codes [R, F], fp32 scales [R]."""
    return _swiglu(gate_up, int8=True, block=block)


def _swiglu(gate_up: Tensor, *, int8: bool, block: int) -> tuple[Tensor, Tensor]:
    check_tensors(gate_up=gate_up)
    gate_up = gate_up.contiguous()
    rows, width = len(gate_up), gate_up.shape[1] // 2
    _check_length(width)
    out = gate_up.new_empty(rows, width, dtype=torch.int8 if int8 else gate_up.dtype)
    scales = gate_up.new_empty(rows, dtype=torch.float32)
    if out.numel():
        _swiglu_kernel[(triton.cdiv(rows, block),)](
            gate_up, out, scales, rows, width, INT8=int8, BLOCK_R=block, BLOCK_F=triton.next_power_of_2(width)
        )
    return out, scales


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise ValueError(f"rows of {length}; one program holds a row of {LONGEST} at most")


@triton.jit
def _round_rows(x):
    """Codes (fp32) and scales of rows [R, D] of fp32."""
    largest = tl.max(tl.abs(x), 1)
    # tl.max passes over a NaN; a broken row has to stay one.
    broken = tl.sum((x != x).to(tl.int32), 1) > 0
    # A plain fp32 division is approximate on a GPU.
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    divisor = tl.where(scale == 0.0, 1.0, scale)
    codes = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
    # 1.5 * 2^23: the sum has no bits left for a fraction, so adding it rounds half to even.
    codes = (codes + 12582912.0) - 12582912.0
    codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
    return tl.where(broken[:, None], 0.0, codes), tl.where(broken, float("nan"), scale)


@triton.jit
def _quantize_kernel(x_ptr, codes_ptr, scales_ptr, rows, length, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * length + d[None, :]
    inside = (row < rows)[:, None] & (d < length)[None, :]
    codes, scale = _round_rows(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32))
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=inside)
    tl.store(scales_ptr + row, scale, mask=row < rows)


@triton.jit
def _swiglu_kernel(
    x_ptr, out_ptr, scales_ptr, rows, width, INT8: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    f = tl.arange(0, BLOCK_F)
    inside = (row < rows)[:, None] & (f < width)[None, :]
    gate_at = x_ptr + row.to(tl.int64)[:, None] * (2 * width) + f[None, :]
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + width, mask=inside, other=0.0).to(tl.float32)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    out_at = out_ptr + row.to(tl.int64)[:, None] * width + f[None, :]
    if INT8:
        # Rounded to the type of the rows first: the codes are those of two kernels in a row.
        codes, scale = _round_rows(narrow(hidden, x_ptr.dtype.element_ty).to(tl.float32))
        tl.store(out_at, codes.to(tl.int8), mask=inside)
        tl.store(scales_ptr + row, scale, mask=row < rows)
    else:
        tl.store(out_at, narrow(hidden, out_ptr.dtype.element_ty), mask=inside)
