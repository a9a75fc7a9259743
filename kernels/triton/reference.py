"""What the kernels of four bits compute, in plain torch: slow, fp32 and obvious. Tests hold every kernel to these.

Those of training are specified elsewhere: `kernels.grouped.grouped_linear_loop`, `kernels.dispatch.gather_rows_plain`
and `combine_rows_plain`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.triton.packed import GROUP, PackedExperts, dequantize_experts, unpack_experts


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [R, D] and fp32 scales [R] of rows: `quant.primitives.quantize_activations`, which a test compares."""
    x = x.float()
    scales = x.abs().amax(-1) / 127
    codes = (x / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)).round().clamp(-127, 127)
    return codes.to(torch.int8), scales


def swiglu_rows(gate_up: Tensor) -> Tensor:
    """fp32 [R, F] of gate and up side by side [R, 2 F]: silu(gate) * up."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_w4a16(x: Tensor, weight: PackedExperts, expert: int) -> Tensor:
    """fp32 [R, N] of rows [R, K] through one expert. The weight is rounded to the type of `x`, as a tensor core needs it."""
    return x.float() @ dequantize_experts(weight)[expert].to(x.dtype).float()


def linear_w4a8(codes: Tensor, scales: Tensor, weight: PackedExperts, expert: int) -> Tensor:
    """fp32 [R, N] of int8 rows [R, K] with scales [R] through one expert with groups along the input.

    The products of a group are summed as integers; then scale of the row times the sum over groups of scale times sum.
    """
    assert weight.axis == "input", "a scale for every input leaves no integers to sum"
    weight_codes, weight_scales = unpack_experts(weight)
    sums = group_sums(codes, weight_codes[expert])
    return (sums.float() * weight_scales[expert].float()).sum(-1) * scales[:, None]


def group_sums(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """int64 [R, N, K / 32]: the sums of products of int8 [R, K] and [N, K] within each group."""
    x = codes.long().unflatten(-1, (-1, GROUP))
    w = weight_codes.long().unflatten(-1, (-1, GROUP))
    return torch.einsum("rgi,ngi->rng", x, w)


def linear_rounded(codes: Tensor, scales: Tensor, weight: PackedExperts, expert: int) -> Tensor:
    """fp32 [R, N] of int8 rows where groups lie along the output: products of the codes with real weights."""
    return (codes.float() @ dequantize_experts(weight)[expert]) * scales[:, None]


def moe(x: Tensor, experts: Tensor, mix: Tensor, gate_up: PackedExperts, down: PackedExperts, *, int8: bool) -> Tensor:
    """fp32 [T, D]: each token's k experts one after the other. x [T, D], experts int [T, k], mix [T, k]."""
    out = torch.zeros(x.shape[0], down.outputs)
    for t in range(x.shape[0]):
        for j in range(experts.shape[1]):
            e = int(experts[t, j])
            hidden = swiglu_rows(_linear(x[t : t + 1], gate_up, e, int8=int8).to(x.dtype)).to(x.dtype)
            out[t] += mix[t, j].float() * _linear(hidden, down, e, int8=int8)[0]
    return out


def _linear(x: Tensor, weight: PackedExperts, expert: int, *, int8: bool) -> Tensor:
    if not int8:
        return linear_w4a16(x, weight, expert)
    return (linear_w4a8 if weight.axis == "input" else linear_rounded)(*quantize_rows(x), weight, expert)
