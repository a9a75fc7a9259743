"""Which tile of rows belongs to which expert, made on the device: the host never learns how many rows an expert has.

The host launches as many tiles as there can be; each looks up its expert, and those beyond the last return at once.
Rows beyond the sum of the counts (a buffer that is not full) belong to one more expert, past the last, that gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.triton.backend import tl, triton


@dataclass(frozen=True)
class TileSchedule:
    """Rows sorted by expert, in tiles of `block_rows` that never hold rows of two experts."""

    bounds: Tensor
    """int32 [3, E + 1]: first row, end row and end of tiles, of each expert and of the rows beyond."""
    experts: int
    rows: int
    block_rows: int

    @property
    def most_tiles(self) -> int:
        """An expert fills all its tiles but one: R // block_rows + E + 1, or a tile a row where that is less."""
        return min(self.rows, self.rows // self.block_rows + self.experts + 1)

    @property
    def expert_block(self) -> int:
        """A power of two that holds E + 1 experts."""
        return triton.next_power_of_2(self.experts + 1)


def tile_schedule(counts: Tensor, rows: int, block_rows: int) -> TileSchedule:
    """Tiles of `rows` rows of which counts [E] (int32 or int64) belong to each expert."""
    experts = len(counts)
    schedule = TileSchedule(counts.new_empty(3, experts + 1, dtype=torch.int32), experts, rows, block_rows)
    _schedule_kernel[(1,)](
        counts, schedule.bounds, rows,
        EXPERTS=experts, EXPERT_BLOCK=schedule.expert_block, BLOCK_ROWS=block_rows, num_warps=1,
    )  # fmt: skip
    return schedule


@triton.jit
def _schedule_kernel(
    counts_ptr, bounds_ptr, rows,
    EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, EXPERT_BLOCK)
    counts = tl.load(counts_ptr + expert, mask=expert < EXPERTS, other=0).to(tl.int32)
    # Counts that add up to more than there is are cut off: no kernel reads or writes outside its tensors.
    end = tl.minimum(tl.cumsum(counts, 0), rows)
    start = tl.minimum(tl.cumsum(counts, 0) - counts, rows)
    end = tl.where(expert < EXPERTS, end, rows)
    tiles = tl.where(expert <= EXPERTS, (end - start + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)
    present = expert <= EXPERTS
    tl.store(bounds_ptr + expert, start, mask=present)
    tl.store(bounds_ptr + (EXPERTS + 1) + expert, end, mask=present)
    tl.store(bounds_ptr + 2 * (EXPERTS + 1) + expert, tl.cumsum(tiles, 0), mask=present)


@triton.jit
def find_tile(bounds_ptr, tile, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Expert, first row and end row of a tile. EXPERTS: rows that are nobody's; more: there is no such tile."""
    index = tl.arange(0, EXPERT_BLOCK)
    ends = tl.load(bounds_ptr + 2 * (EXPERTS + 1) + index, mask=index <= EXPERTS, other=2147483647)
    before = ends <= tile
    expert = tl.sum(before.to(tl.int32), 0)
    first_tile = tl.max(tl.where(before, ends, 0), 0)
    here = expert <= EXPERTS
    first = tl.load(bounds_ptr + expert, mask=here, other=0) + (tile - first_tile) * BLOCK_ROWS
    end = tl.load(bounds_ptr + (EXPERTS + 1) + expert, mask=here, other=0)
    return expert, first, end


@triton.jit
def swizzle(program, tiles, cols, GROUP: tl.constexpr):
    """Tile of rows and of columns of a program: GROUP tiles of rows go through the columns together, out of the L2 cache."""
    in_group = GROUP * cols
    first = program // in_group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    return first + program % in_group % size, program % in_group // size
