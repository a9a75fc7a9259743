"""Sizes of tiles, from tables: the sizes depend on the type and on how many rows an expert has, never on a measurement.

`@triton.autotune` needs a GPU driver when a kernel is first called, times every new shape, and picks differently from run
to run. These tables were written from the shapes that others publish for A100 and H100 (Triton's matmul tutorial, vLLM's
fused_moe); nothing here was tuned on a GPU. Every function takes `blocks` to try others; tests in the interpreter take
large ones, since it costs about a millisecond a step of a loop whatever the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A tile of a product and how it is run. Sizes are powers of two, 16 or more."""

    rows: int
    cols: int
    depth: int
    """Of the dimension that is summed over, a step."""
    warps: int = 4
    stages: int = 3
    """Steps whose loads are under way at once."""
    group: int = 8
    """Tiles of rows that share their tiles of columns while these lie in the L2 cache."""

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "depth"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"blocks.{name}={size} must be a power of two, 16 or more")


HALF = {  # rows an expert, at most: the tile
    16: Blocks(rows=16, cols=128, depth=128, stages=4),
    32: Blocks(rows=32, cols=128, depth=128),
    64: Blocks(rows=64, cols=128, depth=64, stages=4),
    256: Blocks(rows=128, cols=128, depth=64, warps=8),
    1 << 31: Blocks(rows=128, cols=256, depth=64, warps=8),
}
SINGLE = {
    16: Blocks(rows=16, cols=64, depth=64),
    64: Blocks(rows=64, cols=64, depth=32),
    1 << 31: Blocks(rows=128, cols=64, depth=32, warps=8),
}
SMALL_HALF = Blocks(rows=64, cols=64, depth=64, stages=3)
"""Fits the 99 KiB of shared memory that GPUs below the A100 have."""
FOUR_BIT = {  # depth is for groups along the output; where they lie along the input a step is a pair of them
    16: Blocks(rows=16, cols=64, depth=32, stages=4),
    64: Blocks(rows=32, cols=128, depth=32, stages=4),
    1 << 31: Blocks(rows=64, cols=128, depth=32, warps=8, stages=4),
}
FOUR_BIT_SINGLE = Blocks(rows=32, cols=64, depth=32, warps=8, stages=2)
"""fp32 without TF32 has no tensor cores: larger tiles do not fit the registers."""


def product_blocks(dtype: torch.dtype, rows: int, experts: int, device: torch.device) -> Blocks:
    """For a grouped product of `rows` in all: by the mean of an expert, since their counts stay on the device."""
    blocks = _first(SINGLE if dtype == torch.float32 else HALF, rows, experts)
    needed = (blocks.rows + blocks.cols) * blocks.depth * blocks.stages * dtype.itemsize
    return blocks if needed <= _shared_memory(device) else SMALL_HALF


def weight_grad_blocks(dtype: torch.dtype, device: torch.device) -> Blocks:
    """For the gradient of the weights: `rows` is a tile of its inputs, `cols` of outputs, `depth` of the rows summed over."""
    if dtype == torch.float32:
        return Blocks(rows=64, cols=64, depth=32)
    blocks = Blocks(rows=128, cols=128, depth=64, warps=8)
    return blocks if blocks.depth * 256 * 2 * blocks.stages <= _shared_memory(device) else SMALL_HALF


def four_bit_blocks(dtype: torch.dtype, rows: int, experts: int) -> Blocks:
    """For a grouped product of rows of `dtype` with weights of four bits."""
    return FOUR_BIT_SINGLE if dtype == torch.float32 else _first(FOUR_BIT, rows, experts)


def _first(table: dict[int, Blocks], rows: int, experts: int) -> Blocks:
    return next(blocks for most, blocks in table.items() if rows <= most * experts)


@cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 31
    # A block can have what a multiprocessor has but for 1 KiB, which the driver keeps for itself.
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024
