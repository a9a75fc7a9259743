"""A tiny decoder with parts that do nothing, and the importance that says so: what pruning must be able to take away."""

from __future__ import annotations

from dataclasses import replace

import torch

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.importance import Importance, norm_names, uniform_importance
from modeling.init import init_weights

BACKBONE = ModelConfig(
    vocab_size=61, hidden_size=48, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=8, ffn_size=40, window=5,
    max_positions=64, init_std=0.3,
)  # fmt: skip
TOKENS = torch.arange(24).view(2, 12) % 61


def decoder(config: ModelConfig = BACKBONE, seed: int = 0) -> Decoder:
    """Random weights, norms included."""
    model = Decoder(config).requires_grad_(False).eval()
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


def load(config: ModelConfig, state: dict[str, torch.Tensor]) -> Decoder:
    model = Decoder(config).requires_grad_(False).eval()
    model.load_state_dict(state)
    return model


def random_importance(config: ModelConfig = BACKBONE, seed: int = 1) -> Importance:
    """Positive scores without ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) + 0.1

    attends = torch.tensor([float(kind != "skip") for kind in config.attention_kinds])
    energy = {name: draw(config.hidden_size) for name in norm_names(config)}
    return replace(
        uniform_importance(config),
        ffn=draw(config.num_layers, config.ffn_size), hidden=draw(config.hidden_size),
        heads=draw(config.num_layers, config.num_heads) * attends[:, None], blocks=draw(config.num_layers),
        attention=0.5 * draw(config.num_layers) * attends,
        norm_energy={name: share / share.sum() for name, share in energy.items()},
    )  # fmt: skip
