"""The routed experts of a layer with weights of four bits: gate and up, SwiGLU, down, and the mix, from the kernels here.

Few tokens (decoding) take a matrix-vector product for every (token, expert); more are sorted by expert and multiplied in tiles.
The router and the shared expert stay outside, as in modeling/moe.py.

Letters: T tokens, k experts a token, D hidden size, F width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.triton.blocks import Blocks
from kernels.triton.packed import PackedExperts
from kernels.triton.permute import plan_dropless, sum_choices
from kernels.triton.rows import quantize_rows, swiglu_quantize_rows, swiglu_rows
from kernels.triton.w4_grouped import grouped_w4
from kernels.triton.w4_matvec import MatvecBlocks, matvec_w4

DECODE_PAIRS = 64
"""Up to so many (token, expert) pairs an expert's weights are rarely read twice, so sorting gains nothing. Not measured."""
Path = Literal["decode", "prefill"]


@dataclass(frozen=True, kw_only=True)
class MoeBlocks:
    """Sizes for all kernels of a layer; what is None comes from the tables."""

    grouped: Blocks | None = None
    matvec: MatvecBlocks | None = None
    rows: int = 1
    """Rows a program in SwiGLU and rounding."""


def moe_w4a16(
    x: Tensor, experts: Tensor, mix: Tensor, gate_up: PackedExperts, down: PackedExperts,
    *, path: Path | None = None, blocks: MoeBlocks | None = None,
) -> Tensor:  # fmt: skip
    """[T, D]: the sum over a token's experts of mix * down(silu(gate(x)) * up(x)). No gradient.

    Args:
        x: [T, D], bf16, fp16 or fp32; the result has its type, and so has what lies between the kernels.
        experts: int32 or int64 [T, k]; one outside 0..E-1 adds nothing.
        mix: [T, k].
        gate_up: D inputs, 2 F outputs (gate, then up). down: F inputs, D outputs.
        path: None decides by the number of pairs.
    """
    _check(x, experts, mix, gate_up, down)
    return _layer(x, None, x.dtype, experts, mix, gate_up, down, path, blocks or MoeBlocks())


def moe_w4a8(
    x: Tensor, experts: Tensor, mix: Tensor, gate_up: PackedExperts, down: PackedExperts,
    *, path: Path | None = None, blocks: MoeBlocks | None = None,
) -> Tensor:  # fmt: skip
    """`moe_w4a16` with the rows before both products rounded to INT8, one scale a row: what QAT trains and phones run."""
    _check(x, experts, mix, gate_up, down)
    blocks = blocks or MoeBlocks()
    codes, scales = quantize_rows(x, block=blocks.rows)
    return _layer(codes, scales, x.dtype, experts, mix, gate_up, down, path, blocks)


def _check(x: Tensor, experts: Tensor, mix: Tensor, gate_up: PackedExperts, down: PackedExperts) -> None:
    if experts.shape != mix.shape or experts.ndim != 2 or len(experts) != len(x):
        raise ValueError(f"experts {list(experts.shape)} and mix {list(mix.shape)}; expected [{len(x)}, k] for both")
    if gate_up.outputs != 2 * down.inputs or gate_up.experts != down.experts or down.outputs != gate_up.inputs:
        raise ValueError(
            f"gate_up is {gate_up.experts} x {gate_up.inputs} -> {gate_up.outputs}, down is {down.experts} x "
            f"{down.inputs} -> {down.outputs}; expected E x D -> 2 F and E x F -> D"
        )


def _layer(
    x: Tensor, scales: Tensor | None, dtype: torch.dtype, experts: Tensor, mix: Tensor,
    gate_up: PackedExperts, down: PackedExperts, path: Path | None, blocks: MoeBlocks,
) -> Tensor:  # fmt: skip
    if (path or ("decode" if experts.numel() <= DECODE_PAIRS else "prefill")) == "decode":
        chosen = experts.reshape(-1)
        both = matvec_w4(x, gate_up, chosen, scales=scales, dtype=dtype, blocks=blocks.matvec)
        hidden, hidden_scales = _activate(both, scales is not None, blocks.rows)
        out = matvec_w4(hidden, down, chosen, scales=hidden_scales, dtype=dtype, blocks=blocks.matvec)
        slot = torch.arange(experts.numel(), device=x.device).view(experts.shape)
        return sum_choices(out, mix, slot)
    plan = plan_dropless(experts, gate_up.experts)
    # A token's row is read through the index, once for each of its experts, and never copied.
    both = grouped_w4(x, gate_up, plan.load, scales=scales, index=plan.token, dtype=dtype, blocks=blocks.grouped)
    hidden, hidden_scales = _activate(both, scales is not None, blocks.rows)
    out = grouped_w4(hidden, down, plan.load, scales=hidden_scales, dtype=dtype, blocks=blocks.grouped)
    return sum_choices(out, mix, plan.slot)


def _activate(gate_up: Tensor, int8: bool, block: int) -> tuple[Tensor, Tensor | None]:
    return swiglu_quantize_rows(gate_up, block=block) if int8 else (swiglu_rows(gate_up, block=block), None)
