"""Experts of four bits as the GPU kernels read them: two codes a byte, fp16 scales per group of 32. Plain torch.

A row of codes is cut into pairs of groups (64 codes, 32 bytes): byte i of a pair holds code i of its first group in the low
nibble and code i of its second in the high one, each plus 8. So masking a nibble leaves one whole group, with one scale, and
32 neighbours of the other operand to multiply: a `tl.dot` of INT8 needs 32 in a row, and nothing is interleaved.

Rows run along the axis that is grouped:

    axis      a row is             codes          scales            as in
    input     an output's weights  [E, N, K / 2]  [E, N, K / 32]    quant/primitives.py, the packed file
    output    an input's weights   [E, K, N / 2]  [E, K, N / 32]    the expert tensors of published MobileMoE checkpoints

Letters: E experts, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
PAIR = 2 * GROUP
Axis = Literal["input", "output"]


@dataclass(frozen=True, kw_only=True)
class PackedExperts:
    """Weights [E, K, N] of four bits; made by `pack_experts`."""

    codes: Tensor
    """uint8 [E, rows, 32 * pairs of groups]; the second half of an odd last pair is code 0."""
    scales: Tensor
    """fp16 [E, rows, groups]."""
    axis: Axis
    inputs: int
    outputs: int

    @property
    def experts(self) -> int:
        return len(self.codes)

    def to(self, device: torch.device | str) -> PackedExperts:
        """The same on another device."""
        return PackedExperts(
            codes=self.codes.to(device), scales=self.scales.to(device),
            axis=self.axis, inputs=self.inputs, outputs=self.outputs,
        )  # fmt: skip


def pack_experts(codes: Tensor, scales: Tensor, axis: Axis) -> PackedExperts:
    """Packed form of int8 codes in -8..7 and fp16 scales.

    Args:
        codes: [E, N, K] for groups along the input (as `quant.primitives.quantize` has them), [E, K, N] along the output.
        scales: as `codes`, with one for every 32 of the last axis.
        axis: which of the two.

    Raises ValueError where shapes do not fit or a code needs more than four bits.
    """
    if axis not in ("input", "output"):
        raise ValueError(f"{axis=}; expected 'input' or 'output'")
    experts, rows, length = codes.shape
    if length % GROUP or scales.shape != (experts, rows, length // GROUP) or scales.dtype != torch.float16:
        raise ValueError(
            f"codes {list(codes.shape)} with scales {scales.dtype} {list(scales.shape)}; expected rows of a multiple of "
            f"{GROUP} and fp16 [{experts}, {rows}, {length // GROUP}]"
        )
    low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
    if low < -8 or high > 7:
        raise ValueError(f"codes from {low} to {high}; expected -8 to 7")
    nibbles = (F.pad(codes, (0, -length % PAIR)) + 8).to(torch.uint8).unflatten(-1, (-1, 2, GROUP))
    packed = (nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)).flatten(-2)
    inputs, outputs = (length, rows) if axis == "input" else (rows, length)
    return PackedExperts(
        codes=packed.contiguous(), scales=scales.contiguous(), axis=axis, inputs=inputs, outputs=outputs
    )


def unpack_experts(weight: PackedExperts) -> tuple[Tensor, Tensor]:
    """The int8 codes and fp16 scales that `pack_experts` was given."""
    pairs = weight.codes.unflatten(-1, (-1, GROUP))
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-2).flatten(-3).to(torch.int8) - 8
    return codes[..., : weight.scales.shape[-1] * GROUP], weight.scales


def dequantize_experts(weight: PackedExperts) -> Tensor:
    """fp32 [E, K, N]: each code times its scale, which fp32 holds exactly."""
    codes, scales = unpack_experts(weight)
    values = (codes.float().unflatten(-1, (-1, GROUP)) * scales.float().unsqueeze(-1)).flatten(-2)
    return values.transpose(1, 2) if weight.axis == "input" else values
