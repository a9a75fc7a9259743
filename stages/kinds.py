"""What one stage differs from another in, as data and two small functions. `pretrain.py` and its sisters fill it in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from stages.config import StageConfig, StageName
from stages.errors import InputError


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """The rules of one stage."""

    name: StageName
    check: Callable[[StageConfig, str | None], None]
    """Raises InputError for a configuration (and `init_from`) that makes no sense for the stage."""
    prepare: Callable[[Decoder, StageConfig], None]
    """Changes the built model in place, before weights are loaded and before it is sharded."""


def keep_model(model: Decoder, config: StageConfig) -> None:
    """Most stages train the model as it is."""


def require_parent(stage: StageName, init_from: str | None) -> None:
    if init_from is None:
        raise InputError(
            f"{stage} starts from a trained model and got none; name one with --init-from RUN_OR_CHECKPOINT"
        )


def refuse_quant(stage: StageName, config: StageConfig) -> None:
    if config.quant is not None:
        raise InputError(f"{stage}.quant is set, but only the qat stage quantizes; move it to qat.quant")


def stage_model(config: StageConfig, model: ModelConfig, stage: StageName) -> ModelConfig:
    """The model of this stage: RoPE base and longest sequence may change from stage to stage, nothing else.

    Raising `rope_theta` stretches the wavelengths of the rotation, so that positions past the old length meet angles
    seen before (MobileLLM-R1 multiplies it by 8 to go from 4k to 32k).
    """
    model = replace(
        model,
        rope_theta=model.rope_theta if config.rope_theta is None else config.rope_theta,
        max_positions=model.max_positions if config.max_positions is None else config.max_positions,
    )
    if config.seq_len > model.max_positions:
        raise InputError(
            f"{stage}.seq_len={config.seq_len} is longer than the model's {model.max_positions} positions; "
            f"lower it, or raise {stage}.max_positions (and {stage}.rope_theta with it)"
        )
    return model
