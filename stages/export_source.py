"""What every export starts with: a name that is free, and the model with what its file says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modeling.decoder import Decoder
from stages.errors import InputError
from stages.loading import load_model


def check_free(output: Path) -> None:
    """Raises InputError where something of that name exists."""
    if output.exists():
        raise InputError(f"{output} exists; name another, nothing is overwritten")


def load_for_export(checkpoint: str | Path) -> tuple[Decoder, dict[str, Any]]:
    """The model with its latent weights, and `quant`, `tokenizer`, `lineage` as the writers take them."""
    loaded = load_model(checkpoint, latent=True)
    lineage = {**(loaded.lineage.to_dict() if loaded.lineage else {}), "checkpoint": str(loaded.path)}
    return loaded.model, {"quant": loaded.quant, "tokenizer": loaded.tokenizer, "lineage": lineage}
