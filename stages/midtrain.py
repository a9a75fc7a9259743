"""Mid-training: a better mixture at a longer context, the learning rate going to zero, optionally distilled.

MobileLLM-R1 doubles the context and distils from a larger model (arXiv 2509.24945); MobileMoE goes from 2k to 8k at a
tenth of the peak rate (arXiv 2605.27358). The RoPE base is rescaled by the configuration: see `kinds.stage_model`.
"""

from __future__ import annotations

from stages.config import StageConfig
from stages.kinds import StageKind, keep_model, refuse_quant, require_parent


def check(config: StageConfig, init_from: str | None) -> None:
    require_parent("midtrain", init_from)
    refuse_quant("midtrain", config)


MIDTRAIN = StageKind(name="midtrain", check=check, prepare=keep_model)
