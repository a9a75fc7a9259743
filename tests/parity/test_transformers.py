"""`transformers` as the oracle: the same weights give the same logits, in both directions (1e-4 absolute, fp32)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modeling.config import ModelConfig, RopeScaling
from modeling.decoder import Decoder
from modeling.hf_convert import ConversionError, config_from_hf, from_hf, load_hf, save_hf, to_hf
from modeling.init import init_weights

TINY = ModelConfig(
    vocab_size=131, hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=16, ffn_size=80,
    max_positions=64, init_std=0.15,
)  # fmt: skip
SCALINGS = {
    "llama_3.2": RopeScaling(factor=32.0, original_positions=24),
    "low_and_high_are_one": RopeScaling(factor=16.0, original_positions=24, high_frequency=1.0),
}
TOKENS = torch.randint(131, (2, 23), generator=torch.Generator().manual_seed(1))


def decoder(config: ModelConfig, state: dict[str, torch.Tensor] | None = None) -> Decoder:
    model = Decoder(config)
    if state is None:
        init_weights(model, 3)
    else:
        model.load_state_dict(state)
    return model.eval()


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from their start, norms included: a forgotten norm or permutation must show."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
    return model.eval()


def agree(ours: Decoder, theirs: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_llama_of_transformers_gives_its_logits_in_our_decoder(tied: bool, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    hf = LlamaConfig(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=tied)
    theirs = randomise(LlamaForCausalLM(hf))
    theirs.save_pretrained(tmp_path)
    config, state = load_hf(tmp_path)
    assert config.tie_embeddings is tied
    agree(decoder(config, state), theirs)


def llama4_config():  # type: ignore[no-untyped-def]
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        vocab_size=131, hidden_size=48, intermediate_size=80, intermediate_size_mlp=80, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, attention_chunk_size=64,
        use_qk_norm=True, no_rope_layers=[1, 1, 1], moe_layers=[], interleave_moe_layer_step=0, num_local_experts=0,
        num_experts_per_tok=0, attn_temperature_tuning=False, tie_word_embeddings=True,
        layer_types=["full_attention"] * 3, pad_token_id=None,
    )  # fmt: skip


def test_a_random_llama4_text_model_of_transformers_gives_its_logits_in_our_decoder(tmp_path: Path) -> None:
    from transformers import Llama4ForCausalLM

    hf = llama4_config()
    theirs = randomise(Llama4ForCausalLM(hf))
    theirs.save_pretrained(tmp_path)
    config, state = load_hf(tmp_path)
    assert config.qk_norm
    agree(decoder(config, state), theirs)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_a_llama_of_transformers_with_slower_rotation_gives_its_logits(key: str, scaling: RopeScaling, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency, "original_max_position_embeddings": 24}  # fmt: skip
    hf = LlamaConfig(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
                     **({"rope_parameters": {**rope, "rope_theta": 100.0}} if key == "rope_parameters" else
                        {"rope_scaling": rope, "rope_theta": 100.0}))
    theirs = randomise(LlamaForCausalLM(hf))
    theirs.save_pretrained(tmp_path)
    if key == "rope_scaling":  # as versions before 5 wrote it
        config = json.loads((tmp_path / "config.json").read_text())
        del config["rope_parameters"]
        (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": rope, "rope_theta": 100.0}))
    config, state = load_hf(tmp_path)
    assert config.rope_scaling == scaling and config.rope_theta == 100.0
    agree(decoder(config, state), theirs)


EXPORTED = {
    "llama": TINY, "untied": replace(TINY, tie_embeddings=False), "llama4": replace(TINY, qk_norm=True),
    **{name: replace(TINY, rope_scaling=scaling, rope_theta=100.0) for name, scaling in SCALINGS.items()},
    **{f"llama4_{name}": replace(TINY, rope_scaling=scaling, rope_theta=100.0, qk_norm=True)
       for name, scaling in SCALINGS.items()},
}  # fmt: skip


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_transformers_loads_our_export_and_gives_our_logits(config: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ours = decoder(config)
    save_hf(tmp_path / "hf", config, ours.state_dict())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    agree(ours, theirs)


@pytest.mark.parametrize("config", [*EXPORTED.values(), replace(TINY, block_repeat=2)], ids=[*EXPORTED, "shared"])
def test_export_and_import_is_the_identity(config: ModelConfig, tmp_path: Path) -> None:
    model = decoder(config)
    save_hf(tmp_path / "hf", config, model.state_dict())
    again, state = load_hf(tmp_path / "hf")
    assert again == config
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_a_key_left_out_means_what_transformers_takes_it_to_mean() -> None:
    from transformers import Llama4TextConfig, LlamaConfig

    for layout, kind, config in (("llama", LlamaConfig, TINY), ("llama4", Llama4TextConfig, replace(TINY, qk_norm=True))):
        hf, _ = to_hf(config, {}, layout)  # type: ignore[arg-type]
        left_out = ("rms_norm_eps", "rope_theta", "rope_parameters", "head_dim", "max_position_embeddings",
                    "initializer_range", "tie_word_embeddings")
        short = {key: value for key, value in hf.items() if key not in left_out}
        theirs = kind(**{key: value for key, value in short.items() if key not in ("architectures", "model_type")})
        ours = config_from_hf({**short, "attention_chunk_size": 2**20})[0]
        assert ours.norm_eps == theirs.rms_norm_eps and ours.rope_theta == dict(theirs.rope_parameters or {})["rope_theta"]
        assert ours.head_dim == theirs.head_dim and ours.max_positions == theirs.max_position_embeddings
        assert ours.init_std == theirs.initializer_range and ours.tie_embeddings == theirs.tie_word_embeddings


def test_mobilellm_ties_by_its_own_key() -> None:
    hf, state = to_hf(TINY, decoder(TINY).state_dict(), "mobilellm")
    assert hf["share_embedding"] is True and hf["tie_word_embeddings"] is False and "lm_head.weight" not in state
    assert config_from_hf(hf)[0].tie_embeddings


def test_a_shared_llama_is_the_unrolled_one() -> None:
    """Sharing, independently: the stored blocks written out twice in a plain Llama give the same logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = decoder(replace(TINY, block_repeat=2))
    _, state = to_hf(TINY, shared.state_dict(), "llama")
    unrolled = {}
    for name, tensor in state.items():
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            for layer in (2 * int(index), 2 * int(index) + 1):
                unrolled[f"model.layers.{layer}.{rest}"] = tensor
        else:
            unrolled[name] = tensor
    hf = LlamaConfig(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
                     rms_norm_eps=TINY.norm_eps)
    theirs = LlamaForCausalLM(hf).eval()
    theirs.load_state_dict(unrolled, strict=False)
    agree(shared, theirs)


@pytest.mark.parametrize(("config", "layout", "word"), [
    (replace(TINY, attention=("full", "skip", "full")), None, "skip"),
    (replace(TINY, qk_norm=True), "llama", "QK-norm"),
    (replace(TINY, block_repeat=2), "llama", "2 times"),
    (replace(TINY, rope_scaling=SCALINGS["llama_3.2"]), "mobilellm", "no rope_scaling"),
])
def test_what_a_layout_cannot_express_is_refused(config: ModelConfig, layout: str | None, word: str) -> None:
    with pytest.raises(ConversionError, match=word):
        to_hf(config, decoder(config).state_dict(), layout)  # type: ignore[arg-type]


@pytest.mark.parametrize(("change", "word"), [
    ({"model_type": "gpt2"}, "gpt2"), ({"attention_bias": True}, "attention_bias"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling has low_freq_factor=None"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),
    ({"rope_theta": True, "rope_parameters": None}, "rope_theta=True"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, "disagree"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1"), ({"model_type": "olmoe"}, "olmoe.*whole projection"),
    ({"hidden_size": "48"}, "hidden_size"),
    ({"num_key_value_heads": 4}, "num_kv_heads"),
])
def test_a_config_that_is_not_ours_is_refused(change: dict, word: str) -> None:
    hf, state = to_hf(TINY, decoder(TINY).state_dict())
    with pytest.raises(ConversionError, match=word):
        from_hf({**hf, **change}, state)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    save_hf(tmp_path / "hf", TINY, decoder(TINY).state_dict())
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConversionError, match="model.safetensors: damaged"):
        load_hf(tmp_path / "hf")


def test_missing_and_misshapen_weights_are_named() -> None:
    hf, state = to_hf(TINY, decoder(TINY).state_dict())
    with pytest.raises(ConversionError, match="lack model.norm.weight"):
        from_hf(hf, {name: tensor for name, tensor in state.items() if name != "model.norm.weight"})
    with pytest.raises(ConversionError, match="norm.weight is"):
        from_hf(hf, {**state, "model.norm.weight": torch.ones(3)})
