"""Pre-training: next-token prediction from random weights (or from a checkpoint, to go on with other data)."""

from __future__ import annotations

from stages.config import StageConfig
from stages.errors import InputError
from stages.kinds import StageKind, keep_model, refuse_quant


def check(config: StageConfig, init_from: str | None) -> None:
    refuse_quant("pretrain", config)
    if config.distill is not None and config.distill.teacher == "init" and init_from is None:
        raise InputError("pretrain.distill.teacher=init needs a model to start from; name a teacher's run or folder")


PRETRAIN = StageKind(name="pretrain", check=check, prepare=keep_model)
