"""Pure arithmetic of quantization: scales, codes, and back. Training, export and the packed file all call this.

Weights are symmetric integers in groups of `spec.group_size` along the input axis (the last one), with MobileMoE's rule
(arXiv 2605.27358): scale = 2 * max|w| / (2^bits - 1), codes rounded half to even and clamped to [-2^(bits-1),
2^(bits-1) - 1]. So the largest positive weight of a group lands at 7.5 and is clamped to 7 at 4 bits. The scale is
rounded to fp16 BEFORE codes are made: those of the packed file are then exactly those that training saw.

Activations are symmetric int8 with one scale a token, scale = max|x| / 127, in fp32.

Everything is computed in fp32 whatever the input is; a code times its fp16 scale is exact in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.spec import QuantSpec

MAX_SCALE = torch.finfo(torch.float16).max


class QuantError(ValueError):
    """A model or tensor that cannot be quantized as asked."""


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest code of signed integers of `bits`."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def check_groups(name: str, in_features: int, spec: QuantSpec) -> None:
    """Raise QuantError unless whole groups fill a row; padding one in silence would change the packed size."""
    if in_features % spec.group_size:
        raise QuantError(
            f"{name} has rows of {in_features} weights, which quant.group_size={spec.group_size} does not divide; "
            "choose a divisor of every matrix's input size"
        )


def group_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """fp16 scales [rows, in / group_size] of a weight [rows, in].

    A group of zeros (or of values below fp16's range) has scale 0 and codes 0. A scale above fp16's largest is that
    largest; one below 6e-5, fp16's smallest normal, is rounded coarsely.
    """
    grouped = weight.float().unflatten(-1, (-1, spec.group_size))
    largest = torch.linalg.vector_norm(grouped, ord=torch.inf, dim=-1)
    return (largest * (2.0 / (2**spec.weight_bits - 1))).clamp(max=MAX_SCALE).half()


def quantize(weight: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """int8 codes [rows, in] of a weight [rows, in] on the grid of `scales` [rows, in / group_size]."""
    return _codes(weight, scales, spec).flatten(-2).to(torch.int8)


def dequantize(codes: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """fp32 weights [rows, in] of integer codes [rows, in] and their scales [rows, in / group_size]."""
    return (codes.float().unflatten(-1, (-1, spec.group_size)) * scales.float().unsqueeze(-1)).flatten(-2)


def round_to_grid(weight: Tensor, spec: QuantSpec) -> Tensor:
    """`dequantize(quantize(weight))` without the trip through int8: fp32 [rows, in], equal bit for bit."""
    scales = group_scales(weight, spec)
    return _codes(weight, scales, spec).mul_(scales.float().unsqueeze(-1)).flatten(-2)


def _codes(weight: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """Codes as fp32 [rows, groups, group_size], in fresh memory."""
    low, high = code_range(spec.weight_bits)
    # Where the scale is 0 any divisor but 0 does: the weights are far below half of it, so their codes are 0.
    divisor = torch.where(scales == 0, 1.0, scales.float()).unsqueeze(-1)
    return weight.float().unflatten(-1, (-1, spec.group_size)).div(divisor).round_().clamp_(low, high)


def quantize_activations(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """int8 codes [..., D] and fp32 scales [..., 1] of activations [..., D]: symmetric, one scale a token."""
    codes, scales = _activation_codes(x, bits)
    return codes.to(torch.int8), scales


def round_activations(x: Tensor, bits: int = 8) -> Tensor:
    """Activations [..., D] on their int8 grid, fp32: codes times scales of `quantize_activations`."""
    codes, scales = _activation_codes(x, bits)
    return codes.mul_(scales)


def _activation_codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    _, high = code_range(bits)
    x = x.float()
    scales = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1, keepdim=True) / high
    # A token of zeros has scale 0; so has one of denormals so small that the division underflows.
    return x.div(torch.where(scales == 0, 1.0, scales)).round_().clamp_(-high, high), scales
