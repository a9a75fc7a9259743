"""config.json of MobileMoE, read and written, and the Python files that go beside it for `transformers`.

Keys are those of the released checkpoints. Their router is a sigmoid and every layer has experts: no key says otherwise,
so other mixtures cannot be written. `dense_intermediate_size` is a key of ours, written only where the model's
`ffn_size` (which no layer of such a model uses) is not the width that takes part in a token, as it is in all releases.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modeling.config import ModelConfig
from modeling.hf_fields import expect, flag, init_std, number, read_rope, whole, write_rope
from modeling.hf_layouts import ConversionError
from modeling.moe_config import MoEConfig

QUANTIZATION = {
    "format": "mobilemoe-int4-g32", "group_size": 32, "embedding_group_size": 32, "qmin": -8, "qmax": 7, "symmetric": True,
    "packed": True, "scale_dtype": "float16", "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])",
}  # fmt: skip
"""`quantization` of the released QAT checkpoints."""
_REMOTE = Path(__file__).resolve().parent / "hf_mobilemoe_remote"


def add_remote_code(folder: Path) -> None:
    """Write the classes that `config.json` names in `auto_map`: no release of transformers has them."""
    for name in ("configuration_mobilemoe.py", "modeling_mobilemoe.py"):
        shutil.copyfile(_REMOTE / name, folder / name)


def hf_config(config: ModelConfig, *, int4: bool) -> dict[str, Any]:
    """config.json of a model with experts. Raises ConversionError for a mixture that it cannot say."""
    moe = config.moe
    assert moe is not None
    if moe.score != "sigmoid":
        raise ConversionError(f"the mobilemoe layout routes by sigmoid, the model by {moe.score}; no key says otherwise")
    if moe.dense_layers:
        raise ConversionError(f"the mobilemoe layout has experts in every layer, the model's first {moe.dense_layers} are "
                              "dense; no key says so")
    dense = {} if config.ffn_size == moe.active_size else {"dense_intermediate_size": config.ffn_size}
    return {
        "architectures": ["MobileMoEForCausalLM"], "model_type": "mobilemoe",
        "auto_map": {"AutoConfig": "configuration_mobilemoe.MobileMoEConfig",
                     "AutoModelForCausalLM": "modeling_mobilemoe.MobileMoEForCausalLM"},
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": moe.expert_size,
        "intermediate_size_mlp": moe.shared_size, **dense, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "hidden_act": "silu", "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps,
        **write_rope(config, old_keys_only=True), "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.top_k,
        "interleave_moe_layer_step": 1, "no_rope_layers": [1] * config.num_layers,
        "layer_types": ["full_attention"] * config.num_layers, "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": False, "tie_word_embeddings": config.tie_embeddings, "attention_bias": False,
        "attention_dropout": 0.0, "routed_scaling_factor": moe.route_scale, "norm_topk_prob": moe.normalize,
        "initializer_range": config.init_std, "torch_dtype": "bfloat16" if int4 else "float32",
        **({"quantization": dict(QUANTIZATION)} if int4 else {}),
    }  # fmt: skip


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Our config of a MobileMoE config.json. Raises ConversionError for what is not MobileMoE as we know it."""
    _check(hf)
    theta, scaling = read_rope(hf, "mobilemoe")
    moe = MoEConfig(
        num_experts=whole(hf, "num_local_experts"), top_k=whole(hf, "num_experts_per_tok"),
        expert_size=whole(hf, "intermediate_size"), shared_size=whole(hf, "intermediate_size_mlp"),
        normalize=flag(hf, "norm_topk_prob"), route_scale=number(hf, "routed_scaling_factor"),
    )  # fmt: skip
    return ModelConfig(
        vocab_size=whole(hf, "vocab_size"), hidden_size=whole(hf, "hidden_size"), num_layers=whole(hf, "num_hidden_layers"),
        num_heads=whole(hf, "num_attention_heads"), num_kv_heads=whole(hf, "num_key_value_heads"),
        head_dim=whole(hf, "head_dim"), max_positions=whole(hf, "max_position_embeddings"), rope_theta=theta,
        rope_scaling=scaling, norm_eps=number(hf, "rms_norm_eps"), init_std=init_std(hf),
        tie_embeddings=flag(hf, "tie_word_embeddings"), qk_norm=flag(hf, "use_qk_norm"), moe=moe,
        ffn_size=whole(hf, "dense_intermediate_size") if "dense_intermediate_size" in hf else moe.active_size,
    )  # fmt: skip


def _check(hf: Mapping[str, Any]) -> None:
    layers = whole(hf, "num_hidden_layers")
    expect(hf, "interleave_moe_layer_step", 1, "expected 1, experts in every layer")
    for key, wanted in (("no_rope_layers", 1), ("layer_types", "full_attention")):
        value = hf.get(key)
        # The count is compared, not a list of that length made: it is what the file says, and may be anything.
        if value is not None and not (isinstance(value, list) and len(value) == layers and value.count(wanted) == layers):
            raise ConversionError(f"config.json has {key}={value!r}; expected {wanted!r} for each of {layers} layers")
    if hf.get("moe_layers") is not None:
        raise ConversionError("config.json has moe_layers; MobileMoE has experts in every layer and no such key")
    expect(hf, "attn_temperature_tuning", False, "our attention has no temperature")
    quantization = hf.get("quantization")
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise ConversionError(f"config.json has quantization={quantization!r}; expected an object")
    for part, known in QUANTIZATION.items():
        if quantization.get(part) != known:
            raise ConversionError(f"quantization.{part} is {quantization.get(part)!r}; only {known!r} is known")
