"""Mixtures that `transformers` has classes for: the same logits in both directions where they compute what ours do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.hf_convert import ConversionError, Layout, config_from_hf, from_hf, load_hf, save_hf, to_hf
from tests.helpers.moe_models import CONFIG, IDS, MOE, build

SOFTMAX = replace(MOE, score="softmax", shared_size=0, route_scale=1.0)
MODELS: dict[str, tuple[Layout, ModelConfig]] = {
    "mixtral": ("mixtral", replace(CONFIG, qk_norm=False, moe=SOFTMAX)),
    "qwen3_moe": ("qwen3_moe", replace(CONFIG, moe=SOFTMAX)),
    "qwen3_moe_as_it_is": ("qwen3_moe", replace(CONFIG, moe=replace(SOFTMAX, normalize=False), tie_embeddings=False)),
    "qwen3_moe_dense_first": ("qwen3_moe", replace(CONFIG, moe=replace(SOFTMAX, dense_layers=1), rope_scaling=None)),
    "glm4_moe": ("glm4_moe", CONFIG),
    "glm4_moe_dense_first": ("glm4_moe", replace(CONFIG, moe=replace(MOE, dense_layers=2), rope_scaling=None)),
    "glm4_moe_no_norm": ("glm4_moe", replace(CONFIG, qk_norm=False, moe=replace(MOE, normalize=False))),
}


def model(layout: Layout, config: ModelConfig) -> Decoder:
    made = build(config)
    if layout != "glm4_moe":
        for _, buffer in made.named_buffers():
            buffer.zero_()
    return made


@pytest.mark.parametrize(("layout", "config"), MODELS.values(), ids=MODELS)
def test_transformers_gives_our_logits_and_its_own_copy_comes_back(layout: Layout, config: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = model(layout, config)
    save_hf(tmp_path / "hf", config, ours.state_dict(), layout=layout)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs.eval()(IDS).logits, atol=1e-4, rtol=0)
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("hf", "again"):
        again, state = load_hf(tmp_path / folder)
        assert again == config
        assert state.keys() == ours.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_random_mixtral_of_transformers_gives_its_logits_in_our_decoder(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    hf = MixtralConfig(vocab_size=300, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, max_position_embeddings=64, num_local_experts=5, num_experts_per_tok=2)
    theirs = MixtralForCausalLM(hf).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.2)
    theirs.save_pretrained(tmp_path)
    config, state = load_hf(tmp_path)
    ours = Decoder(config).eval()
    ours.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


def test_folders_of_transformers_that_compute_otherwise_are_refused(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": None}  # fmt: skip
    qwen = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **sizes, head_dim=8, num_experts=4, moe_intermediate_size=8, max_position_embeddings=64))  # fmt: skip
    qwen.model.layers[1].self_attn.k_norm.weight.data[3] = 1.5
    glm = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(
        **sizes, head_dim=8, n_routed_experts=4, moe_intermediate_size=8))  # fmt: skip
    olmoe = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**sizes, num_experts=4))
    llama4 = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(
        **{**sizes, "num_experts_per_tok": 1}, head_dim=8, intermediate_size_mlp=8, num_local_experts=4,
        interleave_moe_layer_step=1))  # fmt: skip
    for theirs, words in ((qwen, "layers.1.self_attn.k_norm.weight is not all ones"), (glm, "partial_rotary_factor=0.5"),
                          (olmoe, "whole projection"), (llama4, "weigh an expert's input")):
        theirs.save_pretrained(tmp_path / words[:5])
        with pytest.raises(ConversionError, match=words):
            load_hf(tmp_path / words[:5])


def test_the_plainest_layout_that_holds_a_mixture_is_taken() -> None:
    for layout, config in MODELS.values():
        expected = "mobilemoe" if layout == "glm4_moe" and not config.moe.dense_layers else layout  # type: ignore[union-attr]
        assert to_hf(config, {})[0]["model_type"] == expected


@pytest.mark.parametrize(("layout", "change", "words"), [
    ("mixtral", {"qk_norm": True}, "mixtral layout has no QK-norm"),
    ("qwen3_moe", {"qk_norm": False}, "qwen3_moe layout needs QK"),
    ("qwen3_moe", {"moe": MOE}, "routes by softmax, the model by sigmoid"), ("glm4_moe", {"moe": SOFTMAX}, "by sigmoid"),
    ("mixtral", {"moe": replace(SOFTMAX, normalize=False)}, "normalises their weights"),
    ("mixtral", {"moe": replace(SOFTMAX, dense_layers=1)}, "experts in every layer"),
    ("qwen3_moe", {"moe": replace(SOFTMAX, shared_size=32)}, "neither a shared expert"),
    ("qwen3_moe", {"moe": replace(SOFTMAX, route_scale=2.0)}, "route_scale=2.0"),
    ("glm4_moe", {"moe": replace(MOE, shared_size=0)}, "shared_size=0"),
    ("glm4_moe", {"moe": replace(MOE, shared_size=65)}, "shared_size=65"),
    ("glm4_moe", {"block_repeat": 2}, "cannot run a block 2 times"), ("glm4_moe", {"moe": None}, "needs experts"),
])  # fmt: skip
def test_what_a_layout_does_not_compute_is_refused(layout: Layout, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        to_hf(replace(MODELS[layout][1], **change), {}, layout)


def test_biases_that_a_layout_has_no_place_for_are_refused() -> None:
    config = MODELS["qwen3_moe"][1]
    with pytest.raises(ConversionError, match="no balance biases, and those of model.layers.0 are not zero"):
        to_hf(config, build(config).state_dict())


@pytest.mark.parametrize(("layout", "change", "words"), [
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"), ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only"),
    ("glm4_moe", {"n_group": 2}, "n_group=2"), ("glm4_moe", {"attention_bias": True}, "attention_bias"),
    ("glm4_moe", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("glm4_moe", {"rope_parameters": None, "partial_rotary_factor": None}, "partial_rotary_factor=None"),
    ("mixtral", {"sliding_window": 8}, "sliding_window=8"), ("mixtral", {"num_local_experts": None}, "num_local_experts=None"),
])  # fmt: skip
def test_a_config_that_computes_otherwise_is_refused(layout: Layout, change: dict[str, Any], words: str) -> None:
    hf, _ = to_hf(MODELS[layout][1], {}, layout)
    with pytest.raises(ConversionError, match=words):
        config_from_hf({**hf, **change})


def test_a_norm_that_has_learned_and_experts_that_are_missing_are_refused() -> None:
    layout, config = MODELS["qwen3_moe"]
    hf, state = to_hf(config, model(layout, config).state_dict(), layout)

    def refused(words: str, hf: dict[str, Any] = hf, **tensors: Tensor | None) -> None:
        changed = {**state, **{f"model.layers.1.{name.replace('__', '.')}.weight": value for name, value in tensors.items()}}
        with pytest.raises(ConversionError, match=words):
            from_hf(hf, {name: value for name, value in changed.items() if value is not None})

    refused("layers.1.self_attn.q_norm.weight is not all ones; our QK-norm has no weights",
            self_attn__q_norm=torch.full((32,), 2.0))
    refused("lack model.layers.1.self_attn.k_norm", self_attn__k_norm=None)
    refused("lack model.layers.1.mlp.experts.6.up_proj", mlp__experts__6__up_proj=None)
    refused("lack model.layers.0.mlp.experts.7.gate_proj", {**hf, "num_experts": 8})
    refused("experts.6.* has no place", {**hf, "num_experts": 6})
    refused("of several sizes", mlp__experts__2__down_proj=torch.zeros(64, 31))
    refused("gate_proj and up_proj of several sizes", mlp__experts__2__gate_proj=torch.zeros(32, 65))
    refused("gate_proj and up_proj of several sizes", mlp__experts__2__gate_proj=torch.zeros(31, 64),
            mlp__experts__2__up_proj=torch.zeros(33, 64))
    refused(r"expected 2 dimensions", mlp__experts__2__down_proj=torch.zeros(64))
    refused("lack model.layers.0.mlp.experts", {**hf, "num_experts": 2**31 - 1})
