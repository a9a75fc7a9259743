"""Weights and configs to and from Hugging Face, in three layouts.

| layout | of | what is particular |
| --- | --- | --- |
| `llama` | `LlamaForCausalLM`, MobileLLM-1.5B | RoPE in split halves, as ours |
| `mobilellm` | MobileLLM 125M-1B and -LS | tying goes by `share_embedding` (`tie_word_embeddings` is false and means nothing); `layer_sharing` runs every stored block twice |
| `llama4` | MobileLLM-R1 (`llama4_text`) | `feed_forward`, not `mlp`; RoPE rotates neighbours (2i, 2i+1), so q and k rows are permuted inside each head; weight-free QK-norm |

What a layout cannot express is refused, never dropped.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modeling.config import ModelConfig

Layout = Literal["llama", "mobilellm", "llama4"]


class ConversionError(ValueError):
    """A model that a layout cannot express, or a file that is not of a layout we know."""


# What a config.json that leaves a key out means: the defaults of the class that reads it, which differ.
_OMITTED: dict[Layout, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    "mobilellm": {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    "llama4": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 131_072, "head_dim": 128},
}
_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK_NAMES = {
    **{f"attention.{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    **{f"feed_forward.{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}


def default_layout(config: ModelConfig) -> Layout:
    """The plainest layout that holds the model."""
    return "llama4" if config.qk_norm else "mobilellm" if config.block_repeat > 1 else "llama"


def to_hf(
    config: ModelConfig, state_dict: Mapping[str, Tensor], layout: Layout | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict) of a model. Raises ConversionError where the layout cannot hold it."""
    layout = layout or default_layout(config)
    _check_expressible(config, layout)
    tensors = {}
    for name, tensor in state_dict.items():
        if name.endswith(("attention.q.weight", "attention.k.weight")) and layout == "llama4":
            tensor = interleave_heads(tensor, config.head_dim)
        tensors[_to_hf_name(name, layout)] = tensor
    return _hf_config(config, layout), tensors


def from_hf(hf_config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Our config and state dict. Raises ConversionError for what our decoder does not have, or missing weights."""
    config, layout = config_from_hf(hf_config)
    tensors: dict[str, Tensor] = {}
    for hf_name, tensor in state_dict.items():
        if hf_name == "lm_head.weight" and config.tie_embeddings:
            continue  # the same table again
        name = _from_hf_name(hf_name, layout)
        if name.endswith(("attention.q.weight", "attention.k.weight")) and layout == "llama4":
            tensor = _split_halves(tensor, config.head_dim)
        tensors[name] = tensor
    _check_complete(config, tensors)
    return config, tensors


def save_hf(
    folder: str | Path, config: ModelConfig, state_dict: Mapping[str, Tensor], *, layout: Layout | None = None,
    extra: Callable[[Path, dict[str, Any]], None] | None = None,
) -> None:  # fmt: skip
    """Write config.json and model.safetensors, whole or not at all.

    `extra(folder, config)` may add files, or keys to the config, before the folder appears under its name.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    hf_config, tensors = to_hf(config, state_dict, layout)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    beside.mkdir(parents=True)
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside / "model.safetensors",
                  metadata={"format": "pt"})
        if extra is not None:
            extra(beside, hf_config)
        (beside / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
        beside.rename(folder)
    finally:
        if beside.exists():
            shutil.rmtree(beside)


def load_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a local folder with .safetensors (one file or an index of several) or .bin (loaded without pickle's code)."""
    folder = Path(folder)
    hf_config = read_json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors.update(_read_weights(file))
    return from_hf(hf_config, tensors)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}); expected a Hugging Face model folder") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds no object; expected a Hugging Face config")
    return value


def _weight_files(folder: Path) -> list[Path]:
    for single, index in (("model.safetensors", "model.safetensors.index.json"),
                          ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            # The index is untrusted: it may name files of this folder only.
            if wrong := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
                raise ConversionError(f"{folder / index}: names {wrong[0]!r}, which is not a file of {folder}")
            return [folder / name for name in names]
    raise ConversionError(f"{folder}: no model.safetensors and no pytorch_model.bin; expected a Hugging Face model folder")


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConversionError(f"{file}: damaged or not a weight file ({str(error).splitlines()[0]})") from error


def _to_hf_name(name: str, layout: Layout) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, index, rest = name.split(".", 2)
    hf = _BLOCK_NAMES[rest]
    return f"model.layers.{index}.{hf.replace('mlp.', 'feed_forward.') if layout == 'llama4' else hf}"


def _from_hf_name(hf_name: str, layout: Layout) -> str:
    for ours, theirs in _NAMES.items():
        if hf_name == theirs:
            return ours
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", hf_name):
        rest = match[2].replace("feed_forward.", "mlp.") if layout == "llama4" else match[2]
        for ours, theirs in _BLOCK_NAMES.items():
            if rest == theirs:
                return f"blocks.{match[1]}.{ours}"
    raise ConversionError(f"weight {hf_name!r} has no place in our decoder; expected the {layout} layout without biases")


def interleave_heads(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of every head from halves (i, i + D/2) to neighbours (2i, 2i + 1)."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave_heads`."""
    heads = weight.view(-1, head_dim // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _check_expressible(config: ModelConfig, layout: Layout) -> None:
    if config.output_tokens:
        raise ConversionError(f"the head says {config.head_size} of {config.vocab_size} tokens; no Hugging Face class of "
                              "ours holds a trimmed head")
    kinds = sorted(set(config.attention_kinds) - {"full"})
    if kinds:
        raise ConversionError(f"the {layout} layout has full attention only, the model has {kinds[0]} layers; "
                              "no Hugging Face class holds it yet")
    if config.qk_norm != (layout == "llama4"):
        raise ConversionError(f"the {layout} layout {'needs' if layout == 'llama4' else 'has no'} QK-norm; "
                              f"use layout {default_layout(config)}")
    if config.block_repeat > (2 if layout == "mobilellm" else 1):
        raise ConversionError(f"the {layout} layout cannot run a block {config.block_repeat} times; "
                              "mobilellm shares layers twice")


def _hf_config(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
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


def config_from_hf(hf: Mapping[str, Any]) -> tuple[ModelConfig, Layout]:
    """Our config of a config.json, and its layout. Raises ConversionError for what our decoder does not have."""
    kinds: dict[str, Layout] = {"llama": "llama", "mobilellm": "mobilellm", "llama4_text": "llama4"}
    if hf.get("model_type") not in kinds:
        raise ConversionError(f"model_type={hf.get('model_type')!r} is not one of {', '.join(kinds)}")
    layout = kinds[hf["model_type"]]
    hf = {**_OMITTED[layout], **hf}
    _refuse_unknown(hf, layout)
    heads = int(_need(hf, "num_attention_heads"))
    rope = hf.get("rope_parameters") or {}
    tied = hf.get("share_embedding", False) if layout == "mobilellm" else hf.get("tie_word_embeddings", False)
    try:
        return ModelConfig(
            vocab_size=_need(hf, "vocab_size"), hidden_size=_need(hf, "hidden_size"),
            num_layers=_need(hf, "num_hidden_layers"), num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            ffn_size=_need(hf, "intermediate_size_mlp" if layout == "llama4" else "intermediate_size"),
            head_dim=hf.get("head_dim") or _need(hf, "hidden_size") // heads,
            max_positions=_need(hf, "max_position_embeddings"),
            rope_theta=float(rope.get("rope_theta") or hf["rope_theta"]),
            norm_eps=float(hf["rms_norm_eps"]), init_std=hf.get("initializer_range", 0.02),
            tie_embeddings=bool(tied), qk_norm=layout == "llama4" and bool(hf.get("use_qk_norm", True)),
            block_repeat=2 if hf.get("layer_sharing") else 1,
        ), layout  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ConversionError(f"the config is not a model of ours ({error})") from None


def _need(hf: Mapping[str, Any], key: str) -> Any:
    if not isinstance(hf.get(key), int) or isinstance(hf.get(key), bool):
        raise ConversionError(f"config.json has {key}={hf.get(key)!r}; expected a whole number")
    return hf[key]


def _refuse_unknown(hf: Mapping[str, Any], layout: Layout) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise ConversionError(f"hidden_act={hf['hidden_act']!r}; our feed-forward is SwiGLU with silu")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ConversionError(f"{key} is true; our linears have no biases")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = hf.get(key) or {}
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ConversionError(f"{key}={scaling}; only plain RoPE is supported")
    if layout != "llama4":
        return
    if hf.get("moe_layers") or (hf.get("moe_layers") is None and hf.get("interleave_moe_layer_step")):
        raise ConversionError("the model has expert layers; only dense Llama-4 text models are supported")
    if not all(hf.get("no_rope_layers") or [0]):
        raise ConversionError("no_rope_layers switches RoPE off in some layers; our decoder rotates in all")
    chunked = "chunked_attention" in (hf.get("layer_types") or ["chunked_attention"])
    if chunked and (hf.get("attention_chunk_size") or 0) < hf.get("max_position_embeddings", 0):
        raise ConversionError(f"attention_chunk_size={hf.get('attention_chunk_size')} cuts attention below "
                              "max_position_embeddings; our decoder has no chunked attention")


def _check_complete(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    from modeling.decoder import Decoder

    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}
    if missing := sorted(set(wanted) - set(tensors)):
        raise ConversionError(f"the weights lack {missing[0]} and {len(missing) - 1} more; expected {len(wanted)} tensors")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise ConversionError(f"{name} is {tuple(tensors[name].shape)}, the config says {shape}")
    if extra := sorted(set(tensors) - set(wanted)):
        raise ConversionError(f"the weights hold {extra[0]}, which the config has no place for")
