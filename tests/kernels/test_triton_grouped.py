"""The grouped product of Triton and its gradients against the loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels.triton as kt
from kernels.grouped import grouped_linear_loop
from kernels.triton.blocks import FOUR_BIT, HALF, SINGLE, Blocks, product_blocks
from tests.helpers.triton_inputs import TYPES, assert_rounded, draw

BLOCKS = Blocks(rows=32, cols=64, depth=64)
COUNTS = {
    "uneven": [5, 0, 40, 22],  # tails of one tile and of two, and an expert without rows
    "one takes all": [0, 0, 67, 0],
    "whole tiles": [32, 64, 0, 32],
    "one each": [1, 1, 1, 1],
    "rows to spare": [3, 10, 0, 4],
    "nothing": [0, 0, 0, 0],
}
SPARE = {"rows to spare": 9, "nothing": 6}
CASES = [*((name, torch.float32) for name in COUNTS),
         *((name, dtype) for name in ("uneven", "one takes all") for dtype in (torch.float16, torch.bfloat16))]  # fmt: skip


def inputs(name: str, inner: int, outputs: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    counts = torch.tensor(COUNTS[name], device=device)
    rows = draw(sum(COUNTS[name]) + SPARE.get(name, 0), inner, dtype=dtype, device=device)
    weight = draw(4, inner, outputs, seed=1, dtype=dtype, device=device)
    return rows.requires_grad_(), weight.requires_grad_(), counts


def wanted(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The loop in fp32 on the same rounded numbers; rows beyond the counts are zeros."""
    used = int(counts.sum())
    product = grouped_linear_loop(rows[:used].float(), weight.float(), counts)
    return torch.cat([product, product.new_zeros(len(rows) - used, weight.shape[-1])])


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_the_product_and_its_gradients_are_those_of_the_loop(device, dtype, name):
    rows, weight, counts = inputs(name, 100, 72, dtype, device)
    got, want = kt.grouped_linear(rows, weight, counts, blocks=BLOCKS), wanted(rows, weight, counts)
    assert got.dtype == dtype
    assert_rounded(got, want.detach(), dtype)
    upstream = draw(*want.shape, seed=2, dtype=dtype, device=device)
    mine = torch.autograd.grad(got, (rows, weight), upstream)
    theirs = torch.autograd.grad(want, (rows, weight), upstream.float())
    for a, b in zip(mine, theirs, strict=True):
        # The loop's gradient passes through the type of its input once as well.
        assert_rounded(a, b.float(), dtype, ulps=2.0)


@pytest.mark.parametrize("shape", [(1, 1), (17, 31), (64, 64), (65, 130), (128, 16)], ids=str)
def test_any_size_of_inputs_and_outputs(device, shape):
    rows, weight, counts = inputs("uneven", *shape, torch.float32, device)
    got, want = kt.grouped_linear(rows, weight, counts, blocks=BLOCKS), wanted(rows, weight, counts)
    assert_rounded(got, want.detach(), torch.float32, ulps=2.0)
    upstream = draw(*want.shape, seed=2, device=device)
    grads = [torch.autograd.grad(result, (rows, weight), upstream) for result in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert_rounded(mine, theirs, torch.float32, ulps=2.0)


def test_an_expert_without_rows_gets_a_gradient_of_zeros(device):
    rows, weight, counts = inputs("uneven", 40, 24, torch.float32, device)
    kt.grouped_linear(rows, weight, counts, blocks=BLOCKS).sum().backward()
    assert weight.grad is not None and (weight.grad[1] == 0).all() and (weight.grad[0] != 0).any()


def test_no_rows_at_all(device):
    weight = draw(4, 16, 24, device=device).requires_grad_()
    rows = draw(0, 16, device=device).requires_grad_()
    result = kt.grouped_linear(rows, weight, torch.zeros(4, dtype=torch.int32, device=device), blocks=BLOCKS)
    result.sum().backward()
    assert result.shape == (0, 24) and weight.grad is not None and (weight.grad == 0).all()


def test_strided_rows_and_weights_and_a_broken_row(device):
    counts = torch.tensor([20, 20], device=device)
    rows, weight = draw(40, 96, device=device)[:, 16:64], draw(2, 56, 48, seed=1, device=device).transpose(1, 2)
    rows[3] = float("nan")
    got, want = kt.grouped_linear(rows, weight, counts, blocks=BLOCKS), wanted(rows, weight, counts)
    assert got[3].isnan().all()
    keep = torch.arange(40, device=device) != 3
    assert_rounded(got[keep], want[keep], torch.float32, ulps=2.0)


def test_counts_beyond_the_rows_touch_nothing_outside(device):
    rows, weight = draw(20, 32, device=device), draw(2, 32, 16, seed=1, device=device)
    got = kt.grouped_linear(rows, weight, torch.tensor([8, 1000], device=device), blocks=BLOCKS)
    assert_rounded(got, wanted(rows, weight, torch.tensor([8, 12])), torch.float32, ulps=2.0)


def test_the_same_bits_every_time(device):
    rows, weight, counts = inputs("uneven", 100, 72, torch.bfloat16, device)
    results = []
    for _ in range(2):
        result = kt.grouped_linear(rows, weight, counts, blocks=BLOCKS)
        results.append((result, *torch.autograd.grad(result, (rows, weight), torch.ones_like(result))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_rounds_both_sides(device):
    rows, weight, counts = inputs("uneven", 32, 24, torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = kt.grouped_linear(rows, weight, counts, blocks=BLOCKS)
    want = kt.grouped_linear(rows.bfloat16(), weight.bfloat16(), counts, blocks=BLOCKS)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    got.float().sum().backward()
    assert rows.grad is not None and rows.grad.dtype == torch.float32


def test_what_does_not_fit_is_refused(interpreter):
    rows, weight, counts = draw(6, 5), draw(3, 5, 4), torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"rows \[6, 4\] and weight \[3, 5, 4\]; expected"):
        kt.grouped_linear(rows[:, :4], weight, counts)
    with pytest.raises(ValueError, match=r"counts torch.int64 \[2\]; expected int32 or int64 \[3\]"):
        kt.grouped_linear(rows, weight, counts[:2])
    with pytest.raises(ValueError, match="rows are torch.float64, weight is torch.float64; expected one of"):
        kt.grouped_linear(rows.double(), weight.double(), counts)


def test_the_interpreters_own_bf16_product_is_wrong_and_ours_is_not(interpreter):
    """Two traps: `tl.dot` multiplies the patterns of bf16, and a cast to bf16 cuts off. Both are met in backend.py."""
    from kernels.triton.backend import tl, triton

    @triton.jit
    def plain(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))

    a, b = draw(32, 32, dtype=torch.bfloat16), draw(32, 32, seed=1, dtype=torch.bfloat16)
    want = a.float() @ b.float()
    trapped = torch.empty(32, 32)
    plain[(1,)](a, b, trapped, N=32)
    ours = kt.grouped_linear(a, b[None], torch.tensor([32]), blocks=Blocks(rows=32, cols=32, depth=32))
    # Equal to the fp32 product rounded once, half to even: neither patterns nor cut-off bits.
    assert (ours == want.bfloat16()).float().mean() > 0.99
    if torch.allclose(trapped, want, rtol=0.1):
        pytest.skip("this triton's interpreter multiplies bf16: `multiply` in kernels/triton/backend.py can go")
    assert not (trapped - want).abs().max() < 1.0


def test_the_tables_have_a_tile_for_any_number_of_rows(interpreter):
    for table in (HALF, SINGLE, FOUR_BIT):
        assert list(table) == sorted(table)
    for rows in (0, 1, 1000, 10**7):
        for dtype in TYPES:
            assert product_blocks(dtype, rows, 60, torch.device("cpu")).rows >= 16
    assert product_blocks(torch.bfloat16, 60, 60, torch.device("cpu")).rows == 16
    assert product_blocks(torch.bfloat16, 10**6, 60, torch.device("cpu")).rows == 128
    with pytest.raises(ValueError, match="blocks.rows=24 must be a power of two"):
        Blocks(rows=24, cols=16, depth=16)


def test_without_blocks_the_tables_decide(device):
    rows, weight, counts = inputs("uneven", 40, 24, torch.float32, device)
    assert_rounded(kt.grouped_linear(rows, weight, counts), wanted(rows, weight, counts).detach(), torch.float32, ulps=2.0)


def test_a_schedule_covers_every_row_once(device):
    from kernels.triton.schedule import tile_schedule

    for counts in ([5, 0, 40, 22], [0, 0, 0, 0], [70, 0, 0, 0], [16, 16, 16, 16]):
        schedule = tile_schedule(torch.tensor(counts, device=device), 70, 16)
        start, end, tiles = schedule.bounds.tolist()
        assert start == [sum(counts[:e]) for e in range(5)] and end == [*start[1:], 70]
        assert tiles[-1] == sum(-(-(b - a) // 16) for a, b in zip(start, end, strict=True)) <= schedule.most_tiles
