"""The INT4 form of MobileMoE's released QAT checkpoints: two codes a byte, one fp16 scale for 32 of them.

`NAME.weight` [rows, n] is `NAME.qweight` uint8 [rows, n / 2] and `NAME.weight_scale` fp16 [rows, n / 32]; experts'
`gate_up_proj` and `down_proj` [E, in, out] are `gate_up_qweight` with `gate_up_scale` and so on, grouped along the last
axis like all others, which is their output. A byte holds code 2 i in its low and 2 i + 1 in its high nibble, each a signed
number of four bits in two's complement. A weight is code times scale, exact in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modeling.hf_layouts import ConversionError

GROUP = 32
_STORED_BF16 = ("norm.weight", "expert_bias")


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., n / 2] of int8 codes [..., n] from -8 to 7."""
    low, high = codes.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low & 15) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """int8 codes [..., n] of `pack_nibbles`' bytes [..., n / 2]."""
    pairs = torch.stack((packed << 4, packed), -1).view(torch.int8)
    return (pairs >> 4).flatten(-2)  # of a signed number, >> repeats the sign


def decode(qweight: Tensor, scale: Tensor) -> Tensor:
    """fp32 weights [..., n] of bytes [..., n / 2] and scales [..., n / 32]."""
    return (unpack_nibbles(qweight).float().unflatten(-1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(-2)


def stored_names(hf_name: str) -> tuple[str, str] | None:
    """Names of the bytes and scales of a weight; None for what is never quantized: router, bias and norms."""
    base, _, last = hf_name.rpartition(".")
    if last.endswith("_proj"):
        part = last.removesuffix("_proj")
        return f"{base}.{part}_qweight", f"{base}.{part}_scale"
    if last == "weight" and base.endswith(("_proj", "embed_tokens", "lm_head")):
        return f"{base}.qweight", f"{base}.weight_scale"
    return None


def encode_state(
    tensors: Mapping[str, Tensor], integers: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """A state dict of the base layout with every matrix as its codes and scales, by the same names.

    Norms and balance biases become bf16, as released; routers stay fp32.

    Raises:
        ConversionError: a matrix without integers, or with those of another grid.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names = stored_names(name)
        if names is None:
            result[name] = tensor.to(torch.bfloat16 if name.endswith(_STORED_BF16) else torch.float32)
            continue
        if name not in integers:
            raise ConversionError(f"{name} has no INT4 codes; the mobilemoe-int4 layout quantizes every matrix")
        codes, scales = integers[name]
        wanted = (*tensor.shape[:-1], tensor.shape[-1] // GROUP)
        if codes.shape != tensor.shape or tuple(scales.shape) != wanted or tensor.shape[-1] % GROUP:
            raise ConversionError(f"{name} {tuple(tensor.shape)} has codes {tuple(codes.shape)} and scales "
                                  f"{tuple(scales.shape)}; the mobilemoe-int4 layout has a scale for {GROUP} of the last axis")
        result |= {names[0]: pack_nibbles(codes), names[1]: scales.half()}
    return result


def decode_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base layout's state dict of one in INT4, in fp32.

    Raises:
        ConversionError: bytes without scales or the other way round, of another type or size, or scales without value.
    """
    result: dict[str, Tensor] = {}
    scales_seen: set[str] = set()
    for name, tensor in tensors.items():
        if not name.endswith("qweight"):
            continue
        gated = name.endswith("_qweight")
        scale_name = name.removesuffix("qweight") + ("scale" if gated else "weight_scale")
        if scale_name not in tensors:
            raise ConversionError(f"{name} has no {scale_name} beside it")
        _check_pair(name, tensor, tensors[scale_name])
        scales_seen.add(scale_name)
        result[name.removesuffix("_qweight") + "_proj" if gated else name.removesuffix("qweight") + "weight"] = decode(
            tensor, tensors[scale_name])
    if not result:
        raise ConversionError("config.json says quantization, and no weight is a qweight; expected INT4 weights")
    for name, tensor in tensors.items():
        if name.endswith("_scale") and name not in scales_seen:
            raise ConversionError(f"{name} has no qweight beside it")
        if not name.endswith(("qweight", "_scale")):
            result[name] = tensor
    return result


def _check_pair(name: str, qweight: Tensor, scale: Tensor) -> None:
    if qweight.dtype != torch.uint8 or scale.dtype != torch.float16:
        raise ConversionError(f"{name} is {qweight.dtype} with scales of {scale.dtype}; expected uint8 and float16")
    fits = qweight.ndim == scale.ndim and qweight.shape[:-1] == scale.shape[:-1]
    if not fits or qweight.shape[-1] * 2 != scale.shape[-1] * GROUP:
        raise ConversionError(f"{name} is {tuple(qweight.shape)} with scales {tuple(scale.shape)}; expected "
                              f"{GROUP // 2} bytes for each scale")
    if not bool(torch.isfinite(scale).all()):
        raise ConversionError(f"{name} has scales that are infinite or no numbers")
