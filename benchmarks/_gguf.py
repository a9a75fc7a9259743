"""A GGUF of random Q4_0 weights for llama.cpp: `_gguf.py FILE SIZES_AS_JSON`, in the peer's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np


def add_sizes(writer: Any, config: Any, blocks: int) -> None:
    """What every architecture of llama.cpp is told."""
    writer.add_context_length(max(config.max_positions, 16384))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)


def write_gguf(config: Any, path: Path) -> None:
    """Llama's architecture, every matrix Q4_0, no vocabulary. Shared blocks are unrolled. Needs the `gguf` package."""
    import gguf

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    add_sizes(writer, config, config.num_executed_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(2)

    def matrix(name: str, rows: int, k: int) -> None:
        blocks = draw.integers(0, 256, (rows, k // 32, 18), dtype=np.uint8)
        blocks[:, :, :2] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    h, q, kv, f = config.hidden_size, config.query_size, config.kv_size, config.ffn_size
    matrix("token_embd.weight", config.vocab_size, h)
    if not config.tie_embeddings:
        matrix("output.weight", config.vocab_size, h)
    ones = np.ones(h, np.float32)
    writer.add_tensor("output_norm.weight", ones)
    for i in range(config.num_executed_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", ones)
        for name, rows, k in (("attn_q", q, h), ("attn_k", kv, h), ("attn_v", kv, h), ("attn_output", h, q),
                              ("ffn_gate", f, h), ("ffn_up", f, h), ("ffn_down", h, f)):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", rows, k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_gguf(SimpleNamespace(**json.loads(sys.argv[2])), Path(sys.argv[1]))
