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

    def feed_forward(prefix: str, width: int) -> list[partial[PackedTensor]]:
        return [partial(matrix, f"{prefix}.gate_up", 2 * width, h), partial(matrix, f"{prefix}.down", h, width)]

    h, q, kv = config.hidden_size, config.query_size, config.kv_size
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
        moe = config.moe_at(i)
        if moe is None:
            tensors += feed_forward(f"blocks.{i}.feed_forward", config.ffn_size)
            continue
        # Logits of spread 1: every expert is somebody's.
        router = draw.normal(0, h**-0.5, (moe.num_experts, h)).astype(np.float32)
        tensors.append(partial(f32, f"blocks.{i}.feed_forward.router", router))
        tensors.append(partial(f32, f"blocks.{i}.feed_forward.router_bias", np.zeros(moe.num_experts, np.float32)))
        if moe.shared_size:
            tensors += feed_forward(f"blocks.{i}.feed_forward", moe.shared_size)
        for e in range(moe.num_experts):
            tensors += feed_forward(f"blocks.{i}.experts.{e}", moe.expert_size)
    tensors.append(partial(f32, "norm", ones))
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    tensors.append(partial(f32, "rope.inverse_frequencies", frequencies.numpy()))
    from stages.export_packed import model_metadata

    write_packed(path, {"format": "pocketforge.packed", "model": model_metadata(config), "tokenizer": None}, tensors, crc32c)
