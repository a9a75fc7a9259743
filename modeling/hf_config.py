"""Our config as a config.json of a layout, and back; what either cannot say is refused. MobileMoE's is `hf_mobilemoe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modeling import hf_mobilemoe, hf_stock_moe
from modeling.config import ModelConfig
from modeling.hf_fields import expect, head_sizes, init_std, number, read_rope, whole, write_rope
from modeling.hf_layouts import MOBILEMOE, STOCK_MOE, ConversionError, Layout, default_layout

_KINDS: dict[str, Layout] = {
    "llama": "llama", "mobilellm": "mobilellm", "llama4_text": "llama4", "mobilemoe": "mobilemoe",
    "mixtral": "mixtral", "qwen3_moe": "qwen3_moe", "glm4_moe": "glm4_moe",
}  # fmt: skip
# What a config.json that leaves a key out means: the defaults of the class that reads it, which differ.
_OMITTED: dict[Layout, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    "mobilellm": {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    "llama4": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "head_dim": 128},
}
# Near relatives that people will try, and what keeps them out.
_NOT_OURS = {
    "qwen2_moe": "its attention has biases and its shared expert a gate",
    "olmoe": "its QK-norm goes over the whole projection and has weights; ours goes head by head and has none",
    "deepseek_v3": "its attention is multi-head latent attention",
    "llama4": "it is a model with images; give the folder of its text model (llama4_text)",
}


def hf_config(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """config.json of a model. Raises ConversionError where the layout cannot hold it."""
    _check_expressible(config, layout)
    if layout in STOCK_MOE:
        return hf_stock_moe.hf_config(config, layout)
    if layout in MOBILEMOE:
        return hf_mobilemoe.hf_config(config, int4=layout == "mobilemoe-int4")
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps, **write_rope(config),
        "initializer_range": config.init_std, "attention_bias": False, "tie_word_embeddings": config.tie_embeddings,
        "dtype": "float32",
    }  # fmt: skip
    if layout == "llama":
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, **common}
    if layout == "mobilellm":
        return {
            "architectures": ["MobileLLMForCausalLM"], "model_type": "mobilellm", "mlp_bias": False, **common,
            "share_embedding": config.tie_embeddings, "layer_sharing": config.block_repeat == 2,
            "tie_word_embeddings": False,
        }  # fmt: skip
    return {
        "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", **common,
        "intermediate_size_mlp": config.ffn_size, "use_qk_norm": True, "attn_temperature_tuning": False,
        "no_rope_layers": [1] * config.num_layers, "layer_types": ["full_attention"] * config.num_layers,
        "attention_chunk_size": config.max_positions, "moe_layers": [], "interleave_moe_layer_step": 0,
        "num_local_experts": 0, "num_experts_per_tok": 0,
    }  # fmt: skip


def _check_expressible(config: ModelConfig, layout: Layout) -> None:
    if config.output_tokens:
        raise ConversionError(f"the head says {config.head_size} of {config.vocab_size} tokens; no Hugging Face class of "
                              "ours holds a trimmed head")
    if kinds := sorted(set(config.attention_kinds) - {"full"}):
        raise ConversionError(f"the {layout} layout has full attention only, the model has {kinds[0]} layers; "
                              "no Hugging Face class holds it yet")
    if (config.moe is not None) != (layout in MOBILEMOE | STOCK_MOE):
        raise ConversionError(f"the {layout} layout {'needs' if config.moe is None else 'has no'} experts; "
                              f"use layout {default_layout(config)}")
    if config.block_repeat > (2 if layout == "mobilellm" else 1):
        raise ConversionError(f"the {layout} layout cannot run a block {config.block_repeat} times; "
                              "mobilellm shares layers twice")
    if config.moe is not None:
        return
    if config.qk_norm != (layout == "llama4"):
        raise ConversionError(f"the {layout} layout {'needs' if layout == 'llama4' else 'has no'} QK-norm; "
                              f"use layout {default_layout(config)}")
    if layout == "mobilellm" and config.rope_scaling is not None:
        raise ConversionError("the mobilellm layout has no rope_scaling of type llama3")


def config_from_hf(hf: Mapping[str, Any]) -> tuple[ModelConfig, Layout]:
    """Our config of a config.json, and its layout. Raises ConversionError for what our decoder does not have."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        why = f": {_NOT_OURS[kind]}" if isinstance(kind, str) and kind in _NOT_OURS else ""
        raise ConversionError(f"model_type={kind!r} is not one of {', '.join(_KINDS)}{why}")
    layout = _KINDS[kind]
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ConversionError(f"{key} is true; our linears have no biases")
    expect(hf, "hidden_act", "silu", "our feed-forward is SwiGLU with silu")
    try:
        if layout == "mobilemoe":
            return hf_mobilemoe.config_from_hf(hf), "mobilemoe-int4" if hf.get("quantization") else "mobilemoe"
        if layout in STOCK_MOE:
            return hf_stock_moe.config_from_hf(hf, layout), layout
        return _dense_from_hf({**_OMITTED[layout], **hf}, layout), layout
    except (TypeError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"the config is not a model of ours ({error})") from None


def _dense_from_hf(hf: Mapping[str, Any], layout: Layout) -> ModelConfig:
    if layout == "llama4":
        _check_llama4(hf)
    theta, scaling = read_rope(hf, layout)
    tied = hf.get("share_embedding", False) if layout == "mobilellm" else hf.get("tie_word_embeddings", False)
    return ModelConfig(
        vocab_size=whole(hf, "vocab_size"), hidden_size=whole(hf, "hidden_size"),
        num_layers=whole(hf, "num_hidden_layers"), **head_sizes(hf),
        ffn_size=whole(hf, "intermediate_size_mlp" if layout == "llama4" else "intermediate_size"),
        max_positions=whole(hf, "max_position_embeddings"), rope_theta=theta, rope_scaling=scaling,
        norm_eps=number(hf, "rms_norm_eps"), init_std=init_std(hf), tie_embeddings=bool(tied),
        qk_norm=layout == "llama4" and bool(hf.get("use_qk_norm", True)), block_repeat=2 if hf.get("layer_sharing") else 1,
    )  # fmt: skip


def _check_llama4(hf: Mapping[str, Any]) -> None:
    if hf.get("moe_layers") or (hf.get("moe_layers") is None and hf.get("interleave_moe_layer_step")):
        raise ConversionError("the model has expert layers that weigh an expert's input, Llama 4's; ours weigh its output, "
                              "as MobileMoE's do. Only dense Llama-4 text models are supported")
    if not all(hf.get("no_rope_layers") or [0]):
        raise ConversionError("no_rope_layers switches RoPE off in some layers; our decoder rotates in all")
    chunked = "chunked_attention" in (hf.get("layer_types") or ["chunked_attention"])
    if chunked and (hf.get("attention_chunk_size") or 0) < hf.get("max_position_embeddings", 0):
        raise ConversionError(f"attention_chunk_size={hf.get('attention_chunk_size')} cuts attention below "
                              "max_position_embeddings; our decoder has no chunked attention")
