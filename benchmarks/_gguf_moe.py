"""A GGUF of a mixture of experts with random Q4_0 weights for llama.cpp: `_gguf_moe.py FILE SIZES_AS_JSON`.

The architecture is llama.cpp's `glm4moe`, the nearest it has to MobileMoE: grouped-query attention with query-key norm, sigmoid
scores with a bias for choosing, normalised and scaled weights, a shared expert. It differs in that its query-key norm has
weights and stands before the rotation, that queries, keys and values have a bias (of 0 here), and that its head is a matrix of
its own, of the embedding's shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks._gguf import add_sizes  # noqa: E402

ARCHITECTURE = "glm4moe"


def write_gguf(config: Any, path: Path) -> None:
    """Every matrix but the routers Q4_0, no vocabulary. Needs the `gguf` package."""
    import gguf

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), ARCHITECTURE)
    _describe(writer, config, gguf)

    def matrix(name: str, *shape: int, scale: float = 0.002) -> None:
        # Layers add little to the embedding, or a router would send all tokens to the same experts (stages/random_packed.py).
        low, high = draw.integers(1, 16, (2, *shape[:-1], shape[-1] // 32, 18), dtype=np.uint8)  # -7 to 7: no mean
        blocks = low | (high << 4)
        blocks[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    h, q, kv, moe = config.hidden_size, config.query_size, config.kv_size, config.moe
    matrix("token_embd.weight", config.vocab_size, h, scale=0.2)
    matrix("output.weight", config.vocab_size, h, scale=0.2)
    writer.add_tensor("output_norm.weight", np.ones(h, np.float32))
    for i in range(config.num_layers):
        for name, size in (("attn_norm", h), ("post_attention_norm", h), ("attn_q_norm", config.head_dim),
                           ("attn_k_norm", config.head_dim)):  # fmt: skip
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(size, np.float32))
        for name, size in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            writer.add_tensor(f"blk.{i}.{name}.bias", np.zeros(size, np.float32))
        for name, rows, k in (("attn_q", q, h), ("attn_k", kv, h), ("attn_v", kv, h), ("attn_output", h, q)):
            matrix(f"blk.{i}.{name}.weight", rows, k)
        router = draw.normal(0, h**-0.5, (moe["num_experts"], h)).astype(np.float32)
        writer.add_tensor(f"blk.{i}.ffn_gate_inp.weight", router)
        writer.add_tensor(f"blk.{i}.exp_probs_b.bias", np.zeros(moe["num_experts"], np.float32))
        for kind, widths in (("exps", (moe["num_experts"], moe["expert_size"])), ("shexp", (moe["shared_size"],))):
            *experts, width = widths
            for name, rows, k in (("ffn_gate", width, h), ("ffn_up", width, h), ("ffn_down", h, width)):
                matrix(f"blk.{i}.{name}_{kind}.weight", *experts, rows, k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any, gguf: Any) -> None:
    moe = config.moe
    add_sizes(writer, config, config.num_layers)
    writer.add_expert_count(moe["num_experts"])
    writer.add_expert_used_count(moe["top_k"])
    writer.add_expert_shared_count(moe["shared_size"] // moe["expert_size"])
    writer.add_expert_feed_forward_length(moe["expert_size"])
    writer.add_expert_weights_scale(moe["route_scale"])
    writer.add_expert_weights_norm(moe["normalize"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(moe["dense_layers"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(2)


if __name__ == "__main__":
    write_gguf(SimpleNamespace(**json.loads(sys.argv[2])), Path(sys.argv[1]))
