"""Triton's plan and moves of rows against `kernels.dispatch`, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels.triton as kt
from kernels import dispatch
from kernels.dispatch import DispatchPlan
from tests.helpers.triton_inputs import TYPES, assert_rounded, draw, draw_ids

FIELDS = ("token", "pair", "slot", "counts", "load", "dropped")
BLOCK = (32, 64)


def on(plan: DispatchPlan, device: torch.device) -> DispatchPlan:
    values = {name: getattr(plan, name) for name in FIELDS}
    return DispatchPlan(**{name: None if value is None else value.to(device) for name, value in values.items()})


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 1, 1), (50, 3, 7), (33, 4, 60), (64, 2, 8), (40, 2, 1)])
def test_a_plan_is_that_of_the_stable_sort(device, tokens, k, experts, block):
    ids = draw_ids(tokens, k, below=experts)
    for chosen in (ids, torch.full_like(ids, experts - 1), ids.int()):
        got, want = kt.plan_dropless(chosen.to(device), experts, block=block), dispatch.plan_dropless(chosen.long(), experts)
        for name in FIELDS:
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), name
            assert getattr(got, name).dtype == torch.int64


def test_no_tokens(device):
    plan = kt.plan_dropless(torch.zeros(0, 4, dtype=torch.int64, device=device), 5)
    assert plan.load.tolist() == [0] * 5 and plan.slot.shape == (0, 4)
    rows = draw(0, 8, device=device).requires_grad_()
    out = kt.combine_rows(kt.gather_rows(rows, plan), draw(0, 4, device=device), plan)
    out.sum().backward()
    assert out.shape == (0, 8) and rows.grad is not None


def test_experts_of_others_are_dropped(device):
    """Ids outside 0..E-1 leave padding at the end, which the moves fill with zeros and leave out."""
    ids = torch.tensor([[0, 9], [2, -1], [1, 0]], device=device)
    plan = kt.plan_dropless(ids, 3)
    assert plan.load.tolist() == [2, 1, 1] and int(plan.dropped) == 2
    assert plan.slot.tolist() == [[0, 6], [3, 6], [2, 1]]
    assert plan.token.tolist() == [0, 2, 2, 1, 3, 3] and plan.pair.tolist() == [0, 5, 4, 2, 6, 6]
    rows = draw(3, 5, device=device)
    slots = kt.gather_rows(rows, plan)
    assert torch.equal(slots[:4], rows[[0, 2, 2, 1]]) and (slots[4:] == 0).all()
    mix = torch.tensor([[1.0, float("nan")], [1.0, 1.0], [0.5, 0.5]], device=device)
    assert_rounded(kt.combine_rows(slots, mix, plan), rows.cpu(), torch.float32)


def plans(device: torch.device) -> list[DispatchPlan]:
    ids = draw_ids(41, 3, below=5)
    made = [dispatch.plan_dropless(ids, 5), dispatch.plan_capacity(ids, 5, 10), dispatch.plan_capacity(ids, 5, 60)]
    return [on(plan, device) for plan in made]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("index", range(3), ids=["dropless", "capacity 10", "capacity 60"])
def test_both_moves_and_their_gradients_are_those_of_plain_indexing(device, index, dtype):
    plan = plans(device)[index]
    rows = draw(41, 70, dtype=dtype, device=device).requires_grad_()
    mix = draw(41, 3, seed=1, device=device).requires_grad_()
    slots = draw(len(plan.token), 70, seed=2, dtype=dtype, device=device).requires_grad_()
    wide_rows, wide_slots = (tensor.detach().float().requires_grad_() for tensor in (rows, slots))
    gathered, combined = kt.gather_rows(rows, plan, block=BLOCK), kt.combine_rows(slots, mix, plan, block=BLOCK)
    assert torch.equal(gathered, dispatch.gather_rows_plain(rows, plan)) and combined.dtype == dtype
    want = dispatch.combine_rows_plain(wide_slots, mix, plan)
    assert_rounded(combined, want.detach(), dtype)
    upstream = draw(*combined.shape, seed=3, dtype=dtype, device=device)
    grads = torch.autograd.grad(combined, (slots, mix), upstream)
    wanted = torch.autograd.grad(want, (wide_slots, mix), upstream.float())
    assert_rounded(grads[0], wanted[0], dtype)
    assert_rounded(grads[1], wanted[1], torch.float32)  # mixing weights stay fp32, and so does their gradient
    upstream = draw(*gathered.shape, seed=4, dtype=dtype, device=device)
    (grad,) = torch.autograd.grad(gathered, rows, upstream)
    (want_grad,) = torch.autograd.grad(dispatch.gather_rows_plain(wide_rows, plan), wide_rows, upstream.float())
    assert_rounded(grad, want_grad, dtype)


def test_a_sum_over_choices_is_in_their_order(device):
    """1e8 + 1 - 1e8 is 0 from left to right in fp32, and 1 in another order."""
    plan = on(dispatch.plan_dropless(torch.tensor([[2, 0, 1]]), 3), device)
    slots = torch.empty(3, 1, device=device)
    slots[plan.slot[0]] = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    assert kt.combine_rows(slots, torch.ones(1, 3, device=device), plan).item() == 0.0
    slots[plan.slot[0]] = torch.tensor([[1e8], [-1e8], [1.0]], device=device)
    assert kt.combine_rows(slots, torch.ones(1, 3, device=device), plan).item() == 1.0


def test_a_broken_row_stays_out_of_padding(device):
    plan = on(dispatch.plan_capacity(torch.tensor([[0], [0], [1]]), 2, 2), device)
    slots = kt.gather_rows(torch.tensor([[1.0], [2.0], [float("nan")]], device=device), plan)
    assert slots[:2].tolist() == [[1.0], [2.0]] and slots[2].isnan().all() and slots[3] == 0


def layer(x: Tensor, mix: Tensor, gate_up: Tensor, down: Tensor, plan: DispatchPlan, linear, gather, combine) -> Tensor:
    gate, up = linear(gather(x, plan), gate_up, plan.counts).chunk(2, dim=-1)
    return combine(linear(torch.nn.functional.silu(gate) * up, down, plan.counts), mix, plan)


def test_a_layer_of_experts_made_of_the_kernels_has_the_gradients_of_the_plain_one(device):
    from kernels.grouped import grouped_linear_loop

    ids = draw_ids(30, 2, below=4)
    tensors = [draw(30, 32, device=device), draw(30, 2, seed=1, device=device),
               draw(4, 32, 96, seed=2, device=device), draw(4, 48, 32, seed=3, device=device)]  # fmt: skip
    for tensor in tensors:
        tensor.requires_grad_()
    got = layer(*tensors, kt.plan_dropless(ids.to(device), 4), kt.grouped_linear, kt.gather_rows, kt.combine_rows)
    plan = on(dispatch.plan_dropless(ids, 4), device)
    want = layer(*tensors, plan, grouped_linear_loop, dispatch.gather_rows_plain, dispatch.combine_rows_plain)
    assert_rounded(got, want.detach(), torch.float32, ulps=4.0)
    grads = [torch.autograd.grad(result.square().sum(), tensors) for result in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert_rounded(mine, theirs, torch.float32, ulps=8.0)
