"""Programs of a kernel may run in any order: the interpreter runs them first to last, which would hide one that writes into
another's part of the result, or reads it. Here every kernel also runs last to first, and with results that start as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.triton as kt
from kernels.triton.blocks import Blocks
from tests.helpers.triton_inputs import draw, draw_experts, draw_ids

BLOCKS = Blocks(rows=16, cols=128, depth=64)
COUNTS = torch.tensor([5, 0, 21, 11])


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN (or the largest integer): what a kernel leaves out, or reads too early, is seen."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **options: Any) -> Tensor:
            result = make(*args, **options)
            return result.fill_(float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).max)

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import interpreter_builder

    forwards = interpreter_builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        nx, ny, nz = interpreter_builder.grid_dim
        forwards(nx - 1 - x, ny - 1 - y, nz - 1 - z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)


def grouped() -> list[Tensor]:
    rows, weight = draw(40, 40).requires_grad_(), draw(4, 40, 72, seed=1).requires_grad_()  # three rows to spare
    result = kt.grouped_linear(rows, weight, COUNTS, blocks=BLOCKS)
    return [result, *torch.autograd.grad(result, (rows, weight), draw(40, 72, seed=2))]


def moves() -> list[Tensor]:
    ids = draw_ids(25, 3, below=5) - 1  # some experts are another's
    plan = kt.plan_dropless(ids, 3, block=16)
    rows, mix = draw(25, 40).requires_grad_(), draw(25, 3, seed=1).requires_grad_()
    slots = kt.gather_rows(rows, plan, block=(8, 16))
    result = kt.combine_rows(slots, mix, plan, block=(8, 16))
    grads = torch.autograd.grad(result, (slots, rows, mix), draw(25, 40, seed=2))
    return [plan.token, plan.pair, plan.slot, plan.load, slots, result, *grads]


def rounding() -> list[Tensor]:
    x = draw(21, 80)
    return [*kt.quantize_rows(x, block=4), kt.swiglu_rows(x, block=4), *kt.swiglu_quantize_rows(x, block=4)]


def four_bits() -> list[Tensor]:
    results = []
    codes, scales = kt.quantize_rows(draw(40, 96), block=64)
    experts = draw_ids(6, below=5)  # the last is nobody's
    for axis in ("input", "output"):
        weight = draw_experts(4, 96, 96, axis)
        results.append(kt.grouped_w4(draw(40, 96), weight, COUNTS, blocks=BLOCKS))
        results.append(kt.grouped_w4(codes, weight, COUNTS, scales=scales, blocks=BLOCKS))
        results.append(kt.matvec_w4(draw(3, 96), weight, experts, blocks=kt.MatvecBlocks(outputs=64, pairs=2)))
    return results


@pytest.mark.parametrize("run", [grouped, moves, rounding, four_bits], ids=lambda run: run.__name__)
def test_programs_in_any_order_give_the_same_bits(
    interpreter: torch.device, unwritten_is_nan: None, monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]
) -> None:
    want = run()
    backwards(monkeypatch)
    got = run()
    for first, second in zip(want, got, strict=True):
        assert torch.equal(first, second)  # and so no NaN
