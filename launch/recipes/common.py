"""Parts that the recipes of several families share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data_pipeline.config import SourceConfig
from quant.spec import QuantSpec
from stages.config import DistillConfig, OptimConfig, StageConfig

COMMONSENSE = ("arc_easy", "arc_challenge", "boolq", "piqa", "siqa", "hellaswag", "openbookqa", "winogrande")
"""The eight zero-shot tasks of MobileLLM's table."""


def hf_source(
    name: str, path: str, subset: str = "", *, license: str = "", gated: bool = False, **more: Any
) -> SourceConfig:
    """A set of the Hugging Face hub."""
    return SourceConfig(name=name, path=path, subset=subset, format="hf", license=license, gated=gated, **more)


def int4_qat(sft: StageConfig, *, lr: float, steps: int) -> StageConfig:
    """INT4 group-32 weights (linears and embedding), INT8 dynamic activations, distilled from the SFT model.

    MobileMoE's and MobileLLM-Pro's CPU recipe. The papers do not list the data of this stage; the SFT mixture is
    our assumption.
    """
    return replace(
        sft, steps=steps, quant=QuantSpec(), distill=DistillConfig(teacher="init"),
        optim=OptimConfig(lr=lr, schedule="cosine", warmup_steps=min(200, steps // 10), weight_decay=0.0),
    )  # fmt: skip
