"""A config.json is untrusted: whatever stands under a key, the answer is a model or one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modeling.config import ModelConfig
from modeling.hf_convert import LAYOUTS, ConversionError, Layout, config_from_hf, from_hf, to_hf
from stages.export import int4_integers
from tests.helpers.moe_models import CONFIG, MOE, build

SOFTMAX = replace(MOE, score="softmax", shared_size=0, route_scale=1.0)
MODELS: dict[Layout, ModelConfig] = {
    "llama": replace(CONFIG, moe=None, qk_norm=False), "llama4": replace(CONFIG, moe=None),
    "mobilellm": replace(CONFIG, moe=None, qk_norm=False, rope_scaling=None), "mobilemoe": CONFIG, "mobilemoe-int4": CONFIG,
    "mixtral": replace(CONFIG, qk_norm=False, moe=SOFTMAX), "qwen3_moe": replace(CONFIG, moe=SOFTMAX), "glm4_moe": CONFIG,
}  # fmt: skip
JUNK: tuple[Any, ...] = (
    None, "x", [], {}, -1, 0, 2**31 - 1, 2**70, True, float("nan"), [1, "a"], {"rope_type": 7}, 1e-300,
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_junk_under_any_key_is_one_line(layout: Layout) -> None:
    config = replace(MODELS[layout], num_layers=1)
    model = build(config)
    for _, bias in model.named_buffers():
        bias.zero_()
    hf, state = to_hf(config, model.state_dict(), layout, int4_integers(model, None) if layout == "mobilemoe-int4" else None)
    assert from_hf(hf, state)[0] == config and config_from_hf(hf)[1] == layout
    for key in hf:
        for junk in JUNK:
            try:
                got, _ = from_hf({**hf, key: junk}, state)
            except ConversionError as error:
                assert "\n" not in str(error), key
            else:  # taken all the same: then it plays no part in the weights
                assert (got.hidden_size, got.vocab_size, got.num_layers) == (64, 300, 1)
