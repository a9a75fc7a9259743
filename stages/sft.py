"""Supervised fine-tuning: packed conversations, loss on the assistant's tokens (and the token that ends its turn) only.

Which tokens those are is decided where a conversation becomes ids (`data_pipeline/chat.py`); the objective counts what
is supervised over the whole global batch, so a rank whose rows are mostly prompts does not weigh more.
"""

from __future__ import annotations

from stages.config import StageConfig
from stages.errors import InputError
from stages.kinds import StageKind, keep_model, refuse_quant, require_parent


def check(config: StageConfig, init_from: str | None) -> None:
    require_parent("sft", init_from)
    refuse_quant("sft", config)
    if config.data.kind != "chat":
        raise InputError(f"sft.data.kind={config.data.kind}; expected chat: sources with `messages`")


SFT = StageKind(name="sft", check=check, prepare=keep_model)
