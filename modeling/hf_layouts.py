"""The layouts of Hugging Face folders that we read and write: which there are, and what they call our weights.

| layout | of | what is particular |
| --- | --- | --- |
| `llama` | `LlamaForCausalLM`, MobileLLM-1.5B | RoPE in split halves, as ours |
| `mobilellm` | MobileLLM 125M-1B and -LS | tying goes by `share_embedding` (`tie_word_embeddings` is false and means nothing); `layer_sharing` runs every stored block twice |
| `llama4` | MobileLLM-R1 (`llama4_text`) | `feed_forward`, not `mlp`; RoPE rotates neighbours (2i, 2i+1), so q and k rows are permuted inside each head; weight-free QK-norm |
| `mobilemoe` | MobileMoE Base and SFT | as `llama4`, with experts in every layer |
| `mobilemoe-int4` | MobileMoE QAT | the same as INT4 codes and fp16 scales (`modeling.hf_int4`) |
| `mixtral`, `qwen3_moe`, `glm4_moe` | other mixtures | where they compute what ours do (`modeling.hf_stock_moe`) |

What a layout cannot express is refused, never dropped. docs/huggingface.md says which parts are inferred.
"""  # noqa: E501

from __future__ import annotations

import re
from typing import Literal, get_args

from torch import Tensor

from modeling.config import ModelConfig

Layout = Literal["llama", "mobilellm", "llama4", "mobilemoe", "mobilemoe-int4", "mixtral", "qwen3_moe", "glm4_moe"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
NEIGHBOURS: frozenset[Layout] = frozenset({"llama4", "mobilemoe", "mobilemoe-int4"})
"""Those whose RoPE rotates neighbours."""
STOCK_MOE: frozenset[Layout] = frozenset({"mixtral", "qwen3_moe", "glm4_moe"})
"""Mixtures that `transformers` has classes for."""
MOBILEMOE: frozenset[Layout] = frozenset({"mobilemoe", "mobilemoe-int4"})


class ConversionError(ValueError):
    """A model that a layout cannot express, or a file that is not of a layout we know."""


_OUTER = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_PARTS = ("gate", "up", "down")
_BLOCK = {
    **{f"attention.{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    "attention_norm.weight": "input_layernorm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
}
_LLAMA = {**_BLOCK, **{f"feed_forward.{part}.weight": f"mlp.{part}_proj.weight" for part in _PARTS}}
_LLAMA4 = {ours: theirs.replace("mlp.", "feed_forward.") for ours, theirs in _LLAMA.items()}
_MOBILEMOE = {
    **_BLOCK,
    "feed_forward.router.weight": "feed_forward.router.weight",
    "feed_forward.router.bias": "feed_forward.expert_bias",
    "feed_forward.experts.gate_up": "feed_forward.experts.gate_up_proj",
    "feed_forward.experts.down": "feed_forward.experts.down_proj",
    **{f"feed_forward.shared.{part}.weight": f"feed_forward.shared_expert.{part}_proj.weight" for part in _PARTS},
}
_QWEN = {
    **_LLAMA,
    "feed_forward.router.weight": "mlp.gate.weight", "feed_forward.router.bias": "mlp.gate.e_score_correction_bias",
    "feed_forward.experts.gate_up": "mlp.experts.gate_up_proj", "feed_forward.experts.down": "mlp.experts.down_proj",
    **{f"feed_forward.shared.{part}.weight": f"mlp.shared_experts.{part}_proj.weight" for part in _PARTS},
}  # fmt: skip
_MIXTRAL = {ours: theirs.replace("mlp.", "block_sparse_moe.") for ours, theirs in _QWEN.items()}
_BLOCKS: dict[Layout, dict[str, str]] = {
    "llama": _LLAMA, "mobilellm": _LLAMA, "llama4": _LLAMA4, "mobilemoe": _MOBILEMOE, "mobilemoe-int4": _MOBILEMOE,
    "mixtral": _MIXTRAL, "qwen3_moe": _QWEN, "glm4_moe": _QWEN,
}  # fmt: skip


def default_layout(config: ModelConfig) -> Layout:
    """The plainest layout that holds the model."""
    if config.moe is not None and config.moe.score == "softmax":
        return "qwen3_moe" if config.qk_norm else "mixtral"
    if config.moe is not None:
        return "glm4_moe" if config.moe.dense_layers else "mobilemoe"
    return "llama4" if config.qk_norm else "mobilellm" if config.block_repeat > 1 else "llama"


def to_hf_name(name: str, layout: Layout) -> str:
    """Theirs of a name of our state dict."""
    if name in _OUTER:
        return _OUTER[name]
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{_BLOCKS[layout][rest]}"


def from_hf_name(hf_name: str, layout: Layout) -> str:
    """Ours of a name in their file. Raises ConversionError for a weight that our decoder has no place for."""
    for ours, theirs in _OUTER.items():
        if hf_name == theirs:
            return ours
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", hf_name):
        for ours, theirs in _BLOCKS[layout].items():
            if match[2] == theirs:
                return f"blocks.{match[1]}.{ours}"
    raise ConversionError(f"weight {hf_name!r} has no place in our decoder; expected the {layout} layout without biases")


def rotated(name: str) -> bool:
    """Whether a weight of ours makes what RoPE rotates."""
    return name.endswith(("attention.q.weight", "attention.k.weight"))


def interleave_heads(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [heads * D, ...] of every head from halves (i, i + D/2) to neighbours (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def split_halves(weight: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave_heads`."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
