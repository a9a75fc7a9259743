"""Quantization-aware training: linears and embedding see their rounded weights, gradients pass straight through.

The model that the stage starts from teaches (self-distillation lifts MobileLLM-Pro's INT4 average from 58.6 to 61.0,
arXiv 2511.06719), and the held-out score before the first step is that of plain round-to-nearest.
"""

from __future__ import annotations

from modeling.decoder import Decoder
from quant.apply import prepare as quantize
from stages.config import StageConfig
from stages.errors import InputError
from stages.kinds import StageKind, require_parent


def check(config: StageConfig, init_from: str | None) -> None:
    require_parent("qat", init_from)
    if config.quant is None:
        raise InputError("qat.quant is not set; expected bits and group size, e.g. --qat.quant.weight_bits 4")


def prepare(model: Decoder, config: StageConfig) -> None:
    """Replace layers by fake-quantized ones that share their parameters."""
    assert config.quant is not None, "check() ran"
    quantize(model, config.quant)


QAT = StageKind(name="qat", check=check, prepare=prepare)
