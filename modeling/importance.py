"""How much each part of a backbone matters, as data: what pruning chooses by.

The numbers come from a calibration pass (`stages/importance.py`); this type only says which numbers there are, so that
choosing stays a pure function of a configuration and some tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.config import ModelConfig


def norm_names(config: ModelConfig) -> list[str]:
    """Modules that normalise the residual stream, in the order of the forward pass."""
    names = []
    for index, kind in enumerate(config.attention_kinds):
        names += [] if kind == "skip" else [f"blocks.{index}.attention_norm"]
        names.append(f"blocks.{index}.feed_forward_norm")
    return [*names, "norm"]


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores of every part that can be taken away; among parts of one kind the larger are kept.

    L stored blocks, F FFN channels, H query heads, D channels of the residual stream; floating point, on one device.
    """

    ffn: Tensor
    """[L, F]; compared within a block only."""
    hidden: Tensor
    """[D]; one choice for the whole model."""
    heads: Tensor
    """[L, H] of query heads, 0 in a block without attention. A key/value head counts as the sum of its query heads."""
    blocks: Tensor
    """[L]: what leaving the block out would change."""
    attention: Tensor
    """[L]: what leaving only its attention out would change, in the unit of `blocks`; 0 where there is none."""
    norm_energy: dict[str, Tensor]
    """By name of a norm (`norm_names`): [D], the mean share of each channel in the energy of what the norm reads.
    Shares of one norm sum to 1."""

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where these are not scores of `config`, or not numbers."""
        layers = config.num_layers
        expected = {
            "ffn": (layers, config.ffn_size), "hidden": (config.hidden_size,), "heads": (layers, config.num_heads),
            "blocks": (layers,), "attention": (layers,),
            **{f"norm_energy.{name}": (config.hidden_size,) for name in norm_names(config)},
        }  # fmt: skip
        for name, shape in expected.items():
            part, _, norm = name.partition(".")
            tensor = self.norm_energy.get(norm) if norm else getattr(self, part)
            found = None if tensor is None else tuple(tensor.shape)
            if tensor is None or found != shape:
                raise ValueError(f"importance {name} has shape {found}, the backbone needs {shape}; calibrate this backbone")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"importance {name} holds NaN or infinity; calibrate again, on a checkpoint that is finite")


def uniform_importance(config: ModelConfig) -> Importance:
    """Equal scores everywhere: pruning by them keeps the first of everything."""
    layers, hidden = config.num_layers, config.hidden_size
    attends = torch.tensor([float(kind != "skip") for kind in config.attention_kinds])
    return Importance(
        ffn=torch.ones(layers, config.ffn_size), hidden=torch.ones(hidden),
        heads=attends[:, None].expand(layers, config.num_heads).clone(), blocks=torch.ones(layers),
        attention=0.5 * attends,
        norm_energy={name: torch.full((hidden,), 1 / hidden) for name in norm_names(config)},
    )  # fmt: skip
