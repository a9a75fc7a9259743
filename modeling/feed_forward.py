"""The dense feed-forward: of a block, and of a mixture's shared expert."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from modeling.layers import Linear


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, width)
        self.up = Linear(hidden_size, width)
        self.down = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
