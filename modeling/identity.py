"""When two configurations are the same architecture."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from modeling.config import ModelConfig

_UNSEEN = ("init_std",)


def config_key(config: ModelConfig) -> str:
    """Sixteen hex digits, equal for configurations that compute the same function of the same weights.

    An empty attention pattern is full attention everywhere; the window counts only where a block has one. What a model
    does not have is left out: a field that a later version adds does not rename the models of today.
    """
    values = {**dataclasses.asdict(config), "attention": config.attention_kinds}
    for name in ("moe", "rope_scaling"):
        if values[name] is None:
            del values[name]
    for name in _UNSEEN if "window" in config.attention_kinds else (*_UNSEEN, "window"):
        values.pop(name)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
