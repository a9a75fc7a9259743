"""Small models with experts whose every weight matters: biases and norms are away from their start."""

from __future__ import annotations

import atexit
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from modeling.config import ModelConfig, RopeScaling
from modeling.decoder import Decoder
from modeling.init import init_weights
from modeling.moe_config import MoEConfig

MOE = MoEConfig(num_experts=7, top_k=3, expert_size=32, shared_size=64, route_scale=2.5)
CONFIG = ModelConfig(
    vocab_size=300, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, ffn_size=160, max_positions=64,
    init_std=0.15, qk_norm=True, rope_theta=1000.0, moe=MOE,
    rope_scaling=RopeScaling(factor=16.0, original_positions=32, low_frequency=1.0, high_frequency=1.0),
)  # fmt: skip
IDS = torch.randint(300, (2, 23), generator=torch.Generator().manual_seed(1))
VARIANTS = {
    "released": CONFIG,
    "untied": replace(CONFIG, tie_embeddings=False),
    "plain_rope": replace(CONFIG, rope_scaling=None, qk_norm=False),
    "blended_rope": replace(CONFIG, rope_scaling=RopeScaling(factor=8.0, original_positions=48)),
    "no_shared": replace(CONFIG, moe=replace(MOE, shared_size=0, normalize=False), ffn_size=17),
    "one": replace(CONFIG, moe=replace(MOE, num_experts=1, top_k=1)),
}
"""What the mobilemoe layout can say."""


def build(config: ModelConfig = CONFIG) -> Decoder:
    model = Decoder(config).eval()
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model.requires_grad_(False)


@cache
def _modules() -> str:
    """Where this process keeps the code that comes with models: not with other processes of tests, nor in the home."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return folder.name


def in_transformers(folder: Path, **options: Any) -> Any:
    """The model of `transformers` that a folder describes, with the code that lies in it."""
    from transformers import AutoModelForCausalLM

    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", _modules()):
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
