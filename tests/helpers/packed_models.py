"""Small packed models for tests of the runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.init import init_weights
from modeling.moe_config import MoEConfig
from quant.apply import prepare
from quant.spec import QuantSpec
from stages.export_packed import pack_model

BASE = dict(vocab_size=199, hidden_size=64, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, ffn_size=96,
            max_positions=160, init_std=0.1, window=20)  # fmt: skip
CONFIGS = {
    "plain": ModelConfig(**BASE),
    "one_kv_head": ModelConfig(**{**BASE, "num_kv_heads": 1, "num_heads": 3, "head_dim": 64}),
    "no_groups": ModelConfig(**{**BASE, "num_kv_heads": 6}),
    "untied_norms": ModelConfig(**BASE, tie_embeddings=False, qk_norm=True),
    "flash": ModelConfig(**BASE, attention=("full", "skip", "window")),
    "shared": ModelConfig(**BASE, block_repeat=2, attention=("window", "full", "full")),
}



def mixture(layers: int = 2, **fields: Any) -> ModelConfig:
    """A small mixture of experts; `fields` are those of MoEConfig."""
    moe = MoEConfig(**{"expert_size": 32, "shared_size": 64, **fields})
    return ModelConfig(**{**BASE, "num_layers": layers}, moe=moe)


MIXTURES = {
    "mobile": mixture(num_experts=60, top_k=4, route_scale=2.5),
    "one": mixture(num_experts=1, top_k=1, expert_size=96),
    "all": mixture(num_experts=8, top_k=8, shared_size=0, normalize=False),
    "softmax": mixture(num_experts=7, top_k=2, score="softmax", shared_size=32),
    "dense_first": mixture(layers=3, dense_layers=1, num_experts=17, top_k=3, shared_size=0, expert_size=64),
    "softmax_raw": mixture(num_experts=33, top_k=5, score="softmax", normalize=False, route_scale=0.7),
}


def build(config: ModelConfig, seed: int = 0, spec: QuantSpec | None = None) -> Decoder:
    """A decoder with random weights, prepared for quantization; its norms are not all ones."""
    model = Decoder(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("router.bias"):
                buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
    prepare(model, spec or QuantSpec())
    return model.requires_grad_(False).eval()


def packed(config: ModelConfig, folder: Path, seed: int = 0, **options: object) -> tuple[Decoder, Path]:
    """That model, and its packed file."""
    model = build(config, seed)
    path = folder / "model.pocket"
    pack_model(model, path, quant=QuantSpec(), **options)
    return model, path
