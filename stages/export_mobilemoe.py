"""The INT4 form of MobileMoE's QAT checkpoints from a model of ours: which codes and scales go into the file."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.decoder import Decoder
from quant.apply import convert, prepare
from quant.primitives import QuantError, check_groups, group_scales, quantize
from quant.spec import QuantSpec

_EXPERTS = (".experts.gate_up", ".experts.down")
Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def int4_integers(model: Decoder, quant: QuantSpec | None) -> dict[str, Pair]:
    """int8 codes and fp16 scales of every matrix of a model with its latent weights, by state-dict name.

    Matrices that training rounded have training's codes. Others, experts among them where QAT left them alone, are rounded
    to nearest by the same rule; experts [E, in, out] in groups along their output, as released.

    Raises:
        QuantError: training rounded to another grid than this form has, or a row that groups of 32 do not fill.
    """
    spec = quant or QuantSpec()
    if spec.weight_bits != 4 or spec.group_size != 32 or not spec.embedding:
        raise QuantError(f"the mobilemoe-int4 layout is INT4 in groups of 32, embedding too; the model was trained with {spec}")
    if quant is None:
        prepare(model, spec)
    result = convert(model)
    for name, weight in model.named_parameters():
        if not name.endswith(_EXPERTS):
            continue
        pair = along_last_axis(name, weight, spec)
        trained = result.get(name) if quant is not None else None
        if trained is not None and not all(_equal(*parts) for parts in zip(pair, trained, strict=True)):
            raise QuantError(f"{name} was trained in groups along its input; the mobilemoe-int4 layout groups experts along "
                             "their output")
        result[name] = pair
    return result


def along_last_axis(name: str, weight: Tensor, spec: QuantSpec) -> Pair:
    """Codes [..., n] and scales [..., n / group_size] of a weight [..., n]: every line of the last axis is a row."""
    check_groups(name, weight.shape[-1], spec)
    if not bool(torch.isfinite(weight).all()):
        raise QuantError(f"{name} holds NaN or infinite weights, which have no codes; use an earlier checkpoint")
    scales = group_scales(weight, spec)
    return quantize(weight, scales, spec), scales


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)
