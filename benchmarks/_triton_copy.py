"""A plain copy in Triton: what any kernel that only moves memory could reach on this GPU, in the same run."""

from __future__ import annotations

from collections.abc import Callable

import torch

BLOCK = 4096


def copy_rate(moved: int, device: torch.device, seconds: Callable[[Callable[[], object]], float]) -> float:
    """Bytes a second, read and written, of a copy that moves `moved` bytes in all."""
    from kernels.triton.backend import tl, triton

    @triton.jit
    def copy(from_ptr, to_ptr, words, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < words, other=0), mask=at < words)

    words = max(1, moved // 8)
    source = torch.arange(words, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    grid = (triton.cdiv(words, BLOCK),)
    taken = seconds(lambda: copy[grid](source, target, words, BLOCK=BLOCK))
    if not torch.equal(source, target):
        raise RuntimeError("the copy kernel did not copy; its rate means nothing")
    return 8 * words / taken
