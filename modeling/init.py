"""All initialisation, one function."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from modeling.decoder import Decoder


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Set every weight of a model that has storage.

    | weight | value |
    | --- | --- |
    | matrices and embedding | normal, std `config.init_std` |
    | attention.o, every down | normal, std `config.init_std` / sqrt(2 * executed layers) (GPT-2's residual scaling) |
    | norms | 1 |
    | a router's balance bias | 0 |

    Every tensor is drawn from its own generator, seeded by (seed, name): the values do not depend on the order of
    construction, on the device, or on which layers stand beside.
    """
    for buffer in model.buffers():
        buffer.zero_()
    residual = model.config.init_std / (2 * model.config.num_executed_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
            continue
        std = residual if name.endswith(("attention.o.weight", "down.weight", "experts.down")) else model.config.init_std
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        parameter.copy_(torch.normal(0.0, std, parameter.shape, generator=generator))
