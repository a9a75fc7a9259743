"""Mixtures of experts that `transformers` has classes for, where they compute what our decoder computes.

| layout | our model has |
| --- | --- |
| `mixtral` | softmax, normalised; no QK-norm |
| `qwen3_moe` | softmax; QK-norm; dense first layers |
| `glm4_moe` | sigmoid with balance biases; a shared expert as wide as some routed ones; dense first layers |

The QK-norms of the last two have weights: they are written as ones, and read only where they are ones. Balance biases must
be zero in the first two. On disk every expert has tensors of its own, outputs first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modeling.config import ModelConfig
from modeling.hf_fields import expect, flag, head_sizes, init_std, number, read_rope, whole, write_rope
from modeling.hf_layouts import ConversionError, Layout
from modeling.moe_config import MoEConfig

_ARCHITECTURES: dict[Layout, str] = {
    "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
}  # fmt: skip
_NORMS = ("q_norm", "k_norm")


def hf_config(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """config.json of a model. Raises ConversionError for a mixture that the layout does not compute."""
    moe = config.moe
    assert moe is not None
    _check_expressible(config, moe, layout)
    common: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[layout]], "model_type": layout, "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps, **write_rope(config),
        "initializer_range": config.init_std, "attention_bias": False, "attention_dropout": 0.0, "sliding_window": None,
        "num_experts_per_tok": moe.top_k, "tie_word_embeddings": config.tie_embeddings, "dtype": "float32",
    }  # fmt: skip
    if layout == "mixtral":
        dense = {} if config.ffn_size == moe.active_size else {"dense_intermediate_size": config.ffn_size}
        return {**common, "intermediate_size": moe.expert_size, **dense, "num_local_experts": moe.num_experts}
    common |= {"intermediate_size": config.ffn_size, "moe_intermediate_size": moe.expert_size,
               "norm_topk_prob": moe.normalize}  # fmt: skip
    if layout == "qwen3_moe":
        return {**common, "num_experts": moe.num_experts, "decoder_sparse_step": 1, "use_sliding_window": False,
                "mlp_only_layers": list(range(moe.dense_layers))}  # fmt: skip
    common["rope_parameters"]["partial_rotary_factor"] = 1.0
    return {
        **common, "partial_rotary_factor": 1.0, "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_size // moe.expert_size, "routed_scaling_factor": moe.route_scale,
        "first_k_dense_replace": moe.dense_layers, "n_group": 1, "topk_group": 1, "use_qk_norm": config.qk_norm,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip


def _check_expressible(config: ModelConfig, moe: MoEConfig, layout: Layout) -> None:
    sigmoid = layout == "glm4_moe"
    if moe.score != ("sigmoid" if sigmoid else "softmax"):
        raise ConversionError(f"the {layout} layout routes by {'sigmoid' if sigmoid else 'softmax'}, the model by {moe.score}")
    if not sigmoid and (moe.shared_size or moe.route_scale != 1):
        raise ConversionError(f"the {layout} layout has neither a shared expert nor a scale of what is routed; the model has "
                              f"shared_size={moe.shared_size}, route_scale={moe.route_scale}")
    if sigmoid and (moe.shared_size == 0 or moe.shared_size % moe.expert_size or moe.num_experts < 2):
        raise ConversionError(f"the glm4_moe layout has several experts and a shared one as wide as some of them; the model "
                              f"has {moe.num_experts} of {moe.expert_size} and shared_size={moe.shared_size}")
    if layout == "mixtral" and (moe.dense_layers or not moe.normalize):
        raise ConversionError(f"the mixtral layout has experts in every layer and normalises their weights; the model has "
                              f"dense_layers={moe.dense_layers}, normalize={moe.normalize}")
    if not sigmoid and config.qk_norm != (layout == "qwen3_moe"):
        raise ConversionError(f"the {layout} layout {'has no' if config.qk_norm else 'needs'} QK-norm")


def config_from_hf(hf: Mapping[str, Any], layout: Layout) -> ModelConfig:
    """Our config. Raises ConversionError for what our decoder does not compute."""
    theta, scaling = read_rope(hf, layout)
    _check(hf, layout)
    moe = _moe_from_hf(hf, layout)
    if layout == "mixtral":
        ffn_size = whole(hf, "dense_intermediate_size") if "dense_intermediate_size" in hf else moe.active_size
    else:
        ffn_size = whole(hf, "intermediate_size")
    return ModelConfig(
        vocab_size=whole(hf, "vocab_size"), hidden_size=whole(hf, "hidden_size"), num_layers=whole(hf, "num_hidden_layers"),
        **head_sizes(hf), ffn_size=ffn_size,
        max_positions=whole(hf, "max_position_embeddings"), rope_theta=theta, rope_scaling=scaling,
        norm_eps=number(hf, "rms_norm_eps"), init_std=init_std(hf),
        tie_embeddings=flag(hf, "tie_word_embeddings"), moe=moe,
        qk_norm=layout == "qwen3_moe" or (layout == "glm4_moe" and flag(hf, "use_qk_norm")),
    )  # fmt: skip


def _check(hf: Mapping[str, Any], layout: Layout) -> None:
    if hf.get("sliding_window") is not None and hf.get("use_sliding_window", True):
        raise ConversionError(f"sliding_window={hf['sliding_window']!r}; this layout is read with full attention only")
    if layout == "qwen3_moe":
        expect(hf, "decoder_sparse_step", 1, "expected experts in every layer after the first dense ones")
        only = hf.get("mlp_only_layers") or []
        if not isinstance(only, list) or only != list(range(len(only))):
            raise ConversionError(f"mlp_only_layers={only!r}; only first layers may be dense")
    if layout == "glm4_moe":
        for key in ("n_group", "topk_group"):
            expect(hf, key, 1, "our router has no groups of experts")
        rope = hf.get("rope_parameters") or {}
        rotated = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
        if rotated != 1:
            raise ConversionError(f"partial_rotary_factor={rotated!r}; our decoder rotates whole heads")


def _moe_from_hf(hf: Mapping[str, Any], layout: Layout) -> MoEConfig:
    top_k = whole(hf, "num_experts_per_tok")
    if layout == "mixtral":
        return MoEConfig(num_experts=whole(hf, "num_local_experts"), top_k=top_k, expert_size=whole(hf, "intermediate_size"),
                         score="softmax")  # fmt: skip
    width, normalize = whole(hf, "moe_intermediate_size"), flag(hf, "norm_topk_prob")
    if layout == "qwen3_moe":
        experts = whole(hf, "num_experts" if "num_experts" in hf else "num_local_experts")
        return MoEConfig(num_experts=experts, top_k=top_k, expert_size=width, score="softmax", normalize=normalize,
                         dense_layers=len(hf.get("mlp_only_layers") or []))  # fmt: skip
    return MoEConfig(
        num_experts=whole(hf, "n_routed_experts"), top_k=top_k, expert_size=width, normalize=normalize,
        shared_size=width * whole(hf, "n_shared_experts"), route_scale=number(hf, "routed_scaling_factor"),
        dense_layers=whole(hf, "first_k_dense_replace"),
    )  # fmt: skip


def encode_state(config: ModelConfig, tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Their tensors of ours under their names: experts one by one, norms of ones added, biases of zero left out.

    Raises ConversionError where the biases are not zero.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias") and layout != "glm4_moe":
            if tensor.any():
                raise ConversionError(f"the {layout} layout has no balance biases, and those of {name.split('.mlp.')[0]} are "
                                      "not zero")
        elif match := re.fullmatch(r"(.+\.experts)\.(gate_up|down)_proj", name):
            parts = _part_names(layout)[match[2]]
            for expert, matrix in enumerate(tensor):
                for part, piece in zip(parts, matrix.chunk(len(parts), -1), strict=True):
                    result[f"{match[1]}.{expert}.{part}.weight"] = piece.T.contiguous()
        else:
            result[name] = tensor
    if config.qk_norm:
        for layer in range(config.num_layers if tensors else 0):
            result |= {f"model.layers.{layer}.self_attn.{norm}.weight": torch.ones(config.head_dim) for norm in _NORMS}
    return result


def decode_state(config: ModelConfig, tensors: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse. Raises ConversionError for a QK-norm that has learned, or experts that are missing."""
    moe = config.moe
    assert moe is not None
    left = dict(tensors)
    for layer in range(min(config.num_layers, len(tensors))):
        for norm in _NORMS if config.qk_norm else ():
            name = f"model.layers.{layer}.self_attn.{norm}.weight"
            if not bool((_take(left, name, 1) == 1).all()):
                raise ConversionError(f"{name} is not all ones; our QK-norm has no weights, so this model cannot be loaded")
        if layer < moe.dense_layers:
            continue
        base = f"model.layers.{layer}.{'block_sparse_moe' if layout == 'mixtral' else 'mlp'}"
        for stacked, parts in _part_names(layout).items():
            matrices = [[_take(left, f"{base}.experts.{expert}.{part}.weight", 2) for part in parts]
                        for expert in range(min(moe.num_experts, len(tensors) + 1))]
            if len({matrix.shape for both in matrices for matrix in both}) > 1:
                raise ConversionError(f"{base}.experts have {' and '.join(parts)} of several sizes; expected one")
            left[f"{base}.experts.{stacked}_proj"] = torch.stack([torch.cat(both).T for both in matrices])
        if layout != "glm4_moe":
            left[f"{base}.gate.e_score_correction_bias"] = torch.zeros(moe.num_experts)
    return left


def _take(tensors: dict[str, Tensor], name: str, dimensions: int) -> Tensor:
    if name not in tensors:
        raise ConversionError(f"the weights lack {name}")
    if tensors[name].ndim != dimensions:
        raise ConversionError(f"{name} is {tuple(tensors[name].shape)}; expected {dimensions} dimensions")
    return tensors.pop(name)


def _part_names(layout: Layout) -> dict[str, tuple[str, ...]]:
    if layout == "mixtral":
        return {"gate_up": ("w1", "w3"), "down": ("w2",)}
    return {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
