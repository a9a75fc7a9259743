"""Models of a family's shape with random codes, written straight into a packed file."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kernels.packed_file import PackedTensor, f32, int4, write_packed
from kernels.runtime import crc32c
from modeling.config import ModelConfig
from modeling.layers import rope_frequencies


def full_attention(config: ModelConfig) -> ModelConfig:
    """The shape with full attention in every layer and no query-key norm: what llama.cpp's graph for Llama computes."""
    return replace(config, attention=(), qk_norm=False)


def write_pocket(config: ModelConfig, path: Path) -> None:
    """A packed file; nothing in it was trained."""
    draw = np.random.default_rng(0)

    def matrix(name: str, rows: int, k: int) -> PackedTensor:
        codes = draw.integers(-8, 8, (rows, k), dtype=np.int8)
        scales = np.full((rows, k // 32), 0.02, np.float16)
        return int4(name, codes, scales)

    h, q, kv, f = config.hidden_size, config.query_size, config.kv_size, config.ffn_size
    tensors = [partial(matrix, "embed", config.vocab_size, h)]
    if not config.tie_embeddings:
        tensors.append(partial(matrix, "head", config.vocab_size, h))
    ones = np.ones(h, np.float32)
    for i, kind in enumerate(config.attention_kinds):
        if kind != "skip":
            tensors.append(partial(f32, f"blocks.{i}.attention_norm", ones))
            tensors.append(partial(matrix, f"blocks.{i}.attention.qkv", q + 2 * kv, h))
            tensors.append(partial(matrix, f"blocks.{i}.attention.out", h, q))
        tensors.append(partial(f32, f"blocks.{i}.feed_forward_norm", ones))
        tensors.append(partial(matrix, f"blocks.{i}.feed_forward.gate_up", 2 * f, h))
        tensors.append(partial(matrix, f"blocks.{i}.feed_forward.down", h, f))
    tensors.append(partial(f32, "norm", ones))
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    tensors.append(partial(f32, "rope.inverse_frequencies", frequencies.numpy()))
    from stages.export_packed import model_metadata

    write_packed(path, {"format": "pocketforge.packed", "model": model_metadata(config), "tokenizer": None}, tensors, crc32c)
