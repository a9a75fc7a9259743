"""What a quantizer is, as data. Imports nothing heavy: search and launch read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Weights: symmetric integers in groups along the input axis. Activations: dynamic, one scale a token."""

    __pydantic_config__ = {"extra": "forbid"}

    weight_bits: Literal[4, 8] = 4
    group_size: int = 32
    """Weights that share one scale, along the input axis."""
    expert_axis: Literal["input", "output"] = "input"
    """Along which axis the groups of a mixture's experts lie. `output` is that of the published MobileMoE files; `input` is
    that of all other matrices, whose products are sums of whole groups, and so what the runtime multiplies fastest."""
    activation_bits: Literal[8, 16] = 8
    """8 quantizes the input of every quantized linear per token, symmetric; 16 leaves it alone."""
    embedding: bool = True
    """Quantize the embedding (and so a tied head) as well."""
    method: Literal["minmax"] = "minmax"

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"quant.group_size={self.group_size} must be at least 1")
