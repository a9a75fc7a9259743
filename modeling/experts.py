"""The routed experts of a mixture, all of a layer in two tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped import grouped_linear


class Experts(nn.Module):
    """SwiGLU experts as two tensors, inputs first, as published: gate_up [E, D, 2 F] (gate, then up), down [E, F, D]."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, hidden_size, 2 * width))
        self.down = nn.Parameter(torch.empty(num_experts, width, hidden_size))

    def forward(self, rows: Tensor, counts: Tensor | None) -> Tensor:
        """Rows [S, D] sorted by expert, through theirs; `counts` int64 [E] as in `kernels.grouped.grouped_linear`."""
        return self.compute(rows, counts, self.gate_up, self.down)

    def compute(self, rows: Tensor, counts: Tensor | None, gate_up: Tensor, down: Tensor) -> Tensor:
        """The same with weights that are handed in: some of the experts, where others live elsewhere."""
        gate, up = grouped_linear(rows, gate_up, counts).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, down, counts)
