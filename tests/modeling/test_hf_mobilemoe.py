"""MobileMoE's layouts: names, config and INT4 form there and back, and what neither can say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.config import ModelConfig
from modeling.families import FAMILIES
from modeling.hf_convert import ConversionError, config_from_hf, from_hf, load_hf, save_hf, to_hf
from modeling.hf_int4 import decode, decode_state, encode_state, pack_nibbles, unpack_nibbles
from stages.export import int4_integers
from tests.helpers.moe_models import CONFIG, MOE, VARIANTS, build

RELEASED = {
    "architectures": ["MobileMoEForCausalLM"], "model_type": "mobilemoe", "vocab_size": 128256, "hidden_size": 768,
    "intermediate_size": 384, "intermediate_size_mlp": 1536, "num_hidden_layers": 20, "num_attention_heads": 12,
    "num_key_value_heads": 4, "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 16, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
    }, "num_local_experts": 60, "num_experts_per_tok": 4, "interleave_moe_layer_step": 1, "no_rope_layers": [1] * 20,
    "layer_types": ["full_attention"] * 20, "use_qk_norm": True, "attn_temperature_tuning": False,
    "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "torch_dtype": "bfloat16", "eos_token_id": [128001, 128008, 128009],
}  # fmt: skip
"""The keys of the released small model."""
NIBBLES = {
    "format": "mobilemoe-int4-g32", "group_size": 32, "embedding_group_size": 32, "qmin": -8, "qmax": 7, "symmetric": True,
    "scale_dtype": "float16", "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])", "packed": True,
}  # fmt: skip


def stored(config: ModelConfig = CONFIG) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return to_hf(config, build(config).state_dict())


def stored_int4(config: ModelConfig = CONFIG) -> tuple[dict[str, Any], dict[str, Tensor]]:
    model = build(config)
    return to_hf(config, model.state_dict(), "mobilemoe-int4", int4_integers(model, None))


def test_the_released_config_is_the_familys_and_is_written_again_with_its_keys() -> None:
    config, layout = config_from_hf(RELEASED)
    assert (config, layout) == (FAMILIES["mobilemoe_s"], "mobilemoe")
    assert config_from_hf({**RELEASED, "quantization": NIBBLES}) == (config, "mobilemoe-int4")
    written, _ = to_hf(config, {})
    ours = {"auto_map", "initializer_range"}
    assert {key: value for key, value in written.items() if key not in ours} == {
        **{key: value for key, value in RELEASED.items() if key != "eos_token_id"}, "torch_dtype": "float32",
    }  # fmt: skip
    assert to_hf(config, {}, "mobilemoe-int4", {})[0]["quantization"] == NIBBLES


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_model_comes_back_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    model = build(config)
    save_hf(tmp_path / "hf", config, model.state_dict())
    again, state = load_hf(tmp_path / "hf")
    assert again == config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_names_and_shapes_are_those_of_llama_4_and_of_the_release() -> None:
    _, state = stored(replace(CONFIG, num_layers=1))
    layer = "model.layers.0."
    experts = layer + "feed_forward.experts."
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "model.embed_tokens.weight": (300, 64), "model.norm.weight": (64,), layer + "input_layernorm.weight": (64,),
        layer + "post_attention_layernorm.weight": (64,), layer + "self_attn.q_proj.weight": (128, 64),
        layer + "self_attn.k_proj.weight": (64, 64), layer + "self_attn.v_proj.weight": (64, 64),
        layer + "self_attn.o_proj.weight": (64, 128), layer + "feed_forward.router.weight": (7, 64),
        layer + "feed_forward.expert_bias": (7,), experts + "gate_up_proj": (7, 64, 64), experts + "down_proj": (7, 32, 64),
        layer + "feed_forward.shared_expert.gate_proj.weight": (64, 64),
        layer + "feed_forward.shared_expert.up_proj.weight": (64, 64),
        layer + "feed_forward.shared_expert.down_proj.weight": (64, 64),
    }  # fmt: skip
    _, packed = stored_int4(replace(CONFIG, num_layers=1))
    kinds = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    found = {name.removeprefix(layer): (kinds[tensor.dtype], *tensor.shape) for name, tensor in packed.items()}
    assert found["model.embed_tokens.qweight"] == ("U8", 300, 32)
    assert found["model.embed_tokens.weight_scale"] == ("F16", 300, 2)
    assert found["self_attn.o_proj.qweight"] == ("U8", 64, 64)
    assert found["self_attn.o_proj.weight_scale"] == ("F16", 64, 4)
    assert found["feed_forward.experts.gate_up_qweight"] == ("U8", 7, 64, 32)
    assert found["feed_forward.experts.gate_up_scale"] == ("F16", 7, 64, 2)
    assert found["feed_forward.experts.down_qweight"] == ("U8", 7, 32, 32)
    assert found["feed_forward.experts.down_scale"] == ("F16", 7, 32, 2)
    assert found["feed_forward.router.weight"] == ("F32", 7, 64)
    assert found["feed_forward.expert_bias"] == ("BF16", 7)
    assert found["input_layernorm.weight"] == found["model.norm.weight"] == ("BF16", 64)
    assert len(found) == 5 + 2 * 10 and not any(name.startswith("lm_head") for name in found)


def test_a_byte_is_two_signed_numbers_the_low_half_first() -> None:
    assert pack_nibbles(torch.tensor([[1, -8, 7, -1]], dtype=torch.int8)).tolist() == [[0x81, 0xF7]]
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 2, 2)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    scale = torch.tensor([[0.5, -2.0]], dtype=torch.float16)
    weights = decode(pack_nibbles(torch.full((1, 64), -3, dtype=torch.int8)), scale)
    assert weights.dtype == torch.float32 and weights[0].tolist() == [-1.5] * 32 + [6.0] * 32


def test_the_int4_form_comes_back_on_its_grid() -> None:
    model = build()
    integers = int4_integers(model, None)
    hf, state = to_hf(CONFIG, model.state_dict(), "mobilemoe-int4", integers)
    config, again = from_hf(hf, state)
    assert config == CONFIG and again.keys() == model.state_dict().keys()
    for name, (codes, scales) in integers.items():
        grid = (codes.float().unflatten(-1, (-1, 32)) * scales.float().unsqueeze(-1)).flatten(-2)
        assert torch.equal(again[name], grid)
    for name in set(again) - set(integers):
        close = {"atol": 0, "rtol": 0} if name.endswith("router.weight") else {"atol": 1e-3, "rtol": 2**-8}
        torch.testing.assert_close(again[name].float(), model.state_dict()[name], **close)


@pytest.mark.parametrize(("change", "words"), [
    ({"moe": replace(MOE, score="softmax")}, "routes by sigmoid, the model by softmax"),
    ({"moe": replace(MOE, dense_layers=1)}, "the model's first 1 are dense"),
    ({"attention": ("full", "window", "full")}, "has full attention only, the model has window"),
    ({"block_repeat": 2}, "cannot run a block 2 times"),
    ({"moe": None}, "needs experts; use layout llama4"),
])  # fmt: skip
def test_what_the_layout_cannot_say_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        to_hf(replace(CONFIG, **change), {}, "mobilemoe")


@pytest.mark.parametrize("layout", ["llama", "mobilellm", "llama4"])
def test_dense_layouts_refuse_experts(layout: Any) -> None:
    with pytest.raises(ConversionError, match=f"the {layout} layout has no experts; use layout mobilemoe"):
        to_hf(replace(CONFIG, qk_norm=False), {}, layout)


def test_codes_go_with_the_layout_that_holds_them() -> None:
    with pytest.raises(ConversionError, match="mobilemoe-int4 layout needs codes"):
        to_hf(CONFIG, {}, "mobilemoe-int4")
    with pytest.raises(ConversionError, match="mobilemoe layout has no codes"):
        to_hf(CONFIG, {}, "mobilemoe", {})
    weight = {"model.embed_tokens.weight": torch.zeros(4, 64)}
    with pytest.raises(ConversionError, match="embed_tokens.weight has no INT4 codes"):
        encode_state(weight, {})
    by_input = {"model.embed_tokens.weight": (torch.zeros(4, 64, dtype=torch.int8), torch.zeros(1, 64))}
    with pytest.raises(ConversionError, match="a scale for 32 of the last axis"):
        encode_state(weight, by_input)


@pytest.mark.parametrize(("change", "words"), [
    ({"num_local_experts": 0}, "num_experts=0 must be at least 1"), ({"num_experts_per_tok": 61}, "top_k=61 is more than"),
    ({"routed_scaling_factor": -1.0}, "routed_scaling_factor=-1.0; expected a number above 0"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor=nan"), ({"norm_topk_prob": None}, "norm_topk_prob=None"),
    ({"interleave_moe_layer_step": 2}, "interleave_moe_layer_step=2"), ({"moe_layers": [1]}, "moe_layers"),
    ({"no_rope_layers": [0] * 20}, "no_rope_layers"), ({"no_rope_layers": [1]}, "no_rope_layers"),
    ({"layer_types": ["chunked_attention"] * 20}, "layer_types"), ({"attention_bias": True}, "attention_bias"),
    ({"attn_temperature_tuning": True}, "attn_temperature_tuning"), ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"num_hidden_layers": 2**40}, "num_hidden_layers=1099511627776; expected a whole number"),
    ({"num_hidden_layers": 2**31 - 1}, "no_rope_layers"), ({"use_qk_norm": "yes"}, "use_qk_norm='yes'; expected true or"),
    ({"quantization": {**NIBBLES, "group_size": 64}}, "quantization.group_size is 64; only 32 is known"),
    ({"quantization": {**NIBBLES, "format": "other"}}, "quantization.format is 'other'"),
    ({"quantization": [1]}, r"quantization=\[1\]; expected an object"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling is 'yarn'"),
    ({"rope_scaling": {**RELEASED["rope_scaling"], "factor": 0.5}}, "rope_scaling has factor=0.5"),  # type: ignore[dict-item]
    ({"rope_scaling": {**RELEASED["rope_scaling"], "low_freq_factor": 2.0}}, "rope_scaling: .*is below low"),  # type: ignore[dict-item]
    ({"rope_scaling": [8]}, "rope_scaling=.*expected an object"),
])  # fmt: skip
def test_a_config_that_is_not_mobilemoe_as_we_know_it_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConversionError, match=words) as caught:
        config_from_hf({**RELEASED, **change})
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_misshapen_or_too_few_are_named_as_the_file_names_them() -> None:
    hf, state = stored()
    layer = "model.layers.1.feed_forward."

    def refused(words: str, hf: dict[str, Any] = hf, **tensors: Tensor | None) -> None:
        changed = {**state, **{layer + name.replace("__", "."): tensor for name, tensor in tensors.items()}}
        with pytest.raises(ConversionError, match=words):
            from_hf(hf, {name: tensor for name, tensor in changed.items() if tensor is not None})

    refused(r"lack model.layers.1.feed_forward.expert_bias and 0 more", expert_bias=None)
    refused(r"experts.gate_up_proj is \(5, 64, 64\), the config says \(7, 64, 64\)",
            experts__gate_up_proj=state[layer + "experts.gate_up_proj"][:5])
    refused(r"router.weight is \(7, 64\), the config says \(9, 64\)", {**hf, "num_local_experts": 9})
    refused(r"down_proj is \(7, 64, 32\), the config says \(7, 32, 64\)",
            experts__down_proj=state[layer + "experts.down_proj"].transpose(1, 2))
    refused("weight 'model.layers.1.feed_forward.router.bias' has no place", router__bias=torch.zeros(7))
    refused("config.json says 1000 layers", {**hf, "num_hidden_layers": 1000, "no_rope_layers": None, "layer_types": None})
    refused("a tensor too large to have", {**hf, "num_local_experts": 2**31 - 1, "intermediate_size": 2**31 - 1,
                                           "hidden_size": 2**31 - 1})
    refused("lack", {**hf, "num_hidden_layers": 4, "no_rope_layers": None, "layer_types": None})
    refused("hold model.layers.2.*has no place", {**hf, "num_hidden_layers": 2, "no_rope_layers": None, "layer_types": None})


def test_damaged_int4_weights_are_named() -> None:
    hf, state = stored_int4()
    experts = "model.layers.2.feed_forward.experts."
    name, scale = experts + "down_qweight", experts + "down_scale"

    def refused(words: str, **tensors: Tensor | None) -> None:
        changed = {**state, **{experts + part: tensor for part, tensor in tensors.items()}}
        with pytest.raises(ConversionError, match=words) as caught:
            from_hf(hf, {key: tensor for key, tensor in changed.items() if tensor is not None})
        assert "\n" not in str(caught.value)

    refused(r"down_qweight is \(7, 32, 31\) with scales \(7, 32, 2\); expected 16 bytes", down_qweight=state[name][..., :31])
    refused(r"down_qweight is \(7, 30, 32\) with scales \(7, 32, 2\)", down_qweight=state[name][:, :30])
    refused(r"down_proj is \(5, 32, 64\), the config says \(7, 32, 64\)", down_qweight=state[name][:5],
            down_scale=state[scale][:5])
    refused("down_qweight has no .*down_scale beside it", down_scale=None)
    refused("down_scale has no qweight beside it", down_qweight=None)
    refused("down_qweight is torch.int8 with scales of torch.float16", down_qweight=state[name].view(torch.int8))
    refused("scales that are infinite", down_scale=state[scale] * float("inf"))
    with pytest.raises(ConversionError, match="no weight is a qweight"):
        decode_state({"model.norm.weight": torch.ones(3)})
    with pytest.raises(ConversionError, match="qweight' has no place"):
        from_hf({key: value for key, value in hf.items() if key != "quantization"}, state)


@pytest.mark.parametrize(("kind", "words"), [
    ("olmoe", "whole projection"), ("deepseek_v3", "latent attention"), ("qwen2_moe", "a gate"), (["llama"], "is not one of"),
])  # fmt: skip
def test_relatives_that_our_decoder_is_not_are_refused_with_the_reason(kind: Any, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        config_from_hf({"model_type": kind})
