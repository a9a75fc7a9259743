"""Grouped products and dispatch against the loops and the plain indexing that specify them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.dispatch import (
    DispatchPlan,
    combine_rows,
    combine_rows_plain,
    gather_rows,
    gather_rows_plain,
    plan_capacity,
    plan_dropless,
)
from kernels.grouped import grouped_linear, grouped_linear_loop

COUNTS = {"even": [3, 3, 3], "uneven": [1, 7, 4], "empty": [0, 9, 0], "none": [0, 0, 0]}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(result: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((result * upstream).sum(), inputs)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_the_operation_and_its_gradient_are_those_of_the_loop(counts: list[int]) -> None:
    rows, weight = draw(sum(counts), 5).requires_grad_(), draw(3, 5, 6, seed=1).requires_grad_()
    upstream, sizes = draw(sum(counts), 6, seed=2), torch.tensor(counts)
    want, got = grouped_linear_loop(rows, weight, sizes), grouped_linear(rows, weight, sizes)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(gradients(got, upstream, rows, weight), gradients(want, upstream, rows, weight), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_large_experts_through_onednn_give_the_same() -> None:
    rows, weight = draw(90, 512).float().requires_grad_(), draw(4, 512, 520, seed=1).float().mul(0.05).requires_grad_()
    sizes, upstream = torch.tensor([40, 0, 3, 47]), draw(90, 520, seed=2).float()
    want, got = grouped_linear_loop(rows, weight, sizes), grouped_linear(rows, weight, sizes)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(gradients(got, upstream, rows, weight), gradients(want, upstream, rows, weight), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-4)


def test_without_counts_all_experts_have_as_many_rows() -> None:
    rows, weight = draw(6, 5).requires_grad_(), draw(3, 5, 4, seed=1).requires_grad_()
    want, got = grouped_linear_loop(rows, weight), grouped_linear(rows, weight)
    torch.testing.assert_close(got, want)
    upstream = draw(6, 4, seed=2)
    for mine, theirs in zip(gradients(got, upstream, rows, weight), gradients(want, upstream, rows, weight), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_counts_that_do_not_fit_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 5 rows, 6 were given"):
        grouped_linear(draw(6, 5), draw(3, 5, 4), torch.tensor([1, 2, 2]))
    with pytest.raises(ValueError, match="7 rows cannot be shared equally by 3 experts"):
        grouped_linear(draw(7, 5), draw(3, 5, 4))


def chosen(tokens: int, experts: int, k: int, seed: int = 0) -> Tensor:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k, dim=-1).indices


def plans() -> list[DispatchPlan]:
    ids = chosen(11, 4, 2)
    return [plan_dropless(ids, 4), plan_capacity(ids, 4, 3), plan_capacity(ids, 4, 20), plan_capacity(ids, 4, 1)]


def test_a_dropless_plan_sorts_by_expert_and_then_by_token() -> None:
    ids = chosen(11, 4, 2)
    plan = plan_dropless(ids, 4)
    assert plan.counts is not None and plan.counts.tolist() == [int((ids == e).sum()) for e in range(4)]
    want = sorted((int(ids[t, j]), t) for t in range(11) for j in range(2))
    assert list(zip(ids.reshape(-1)[plan.pair].tolist(), plan.token.tolist(), strict=True)) == want
    assert torch.equal(plan.pair[plan.slot], torch.arange(22).view(11, 2))


@pytest.mark.parametrize("capacity", [1, 3, 20])
def test_a_plan_with_capacities_serves_the_first_comers(capacity: int) -> None:
    ids = chosen(11, 4, 2)
    plan = plan_capacity(ids, 4, capacity)
    dropped = 0
    for e in range(4):
        wanting = [(t, j) for t in range(11) for j in range(2) if ids[t, j] == e]
        dropped += max(0, len(wanting) - capacity)
        for place, (t, j) in enumerate(wanting):
            if place < capacity:
                assert plan.slot[t, j] == e * capacity + place and plan.token[e * capacity + place] == t
            else:
                assert plan.slot[t, j] == 4 * capacity
        padding = plan.token[e * capacity + len(wanting) : (e + 1) * capacity]
        assert (padding == 11).all()
    assert plan.dropped == dropped and plan.load.sum() == 22


@pytest.mark.parametrize("index", range(4))
def test_both_moves_and_their_gradients_are_those_of_plain_indexing(index: int) -> None:
    plan = plans()[index]
    rows, mix = draw(11, 5).requires_grad_(), draw(11, 2, seed=1).requires_grad_()
    slots = draw(len(plan.token), 5, seed=2).requires_grad_()
    pairs = [(gather_rows(rows, plan), gather_rows_plain(rows, plan), (rows,)),
             (combine_rows(slots, mix, plan), combine_rows_plain(slots, mix, plan), (slots, mix))]  # fmt: skip
    for got, want, inputs in pairs:
        torch.testing.assert_close(got, want)
        upstream = draw(*got.shape, seed=3)
        for mine, theirs in zip(gradients(got, upstream, *inputs), gradients(want, upstream, *inputs), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_broken_row_stays_out_of_padding() -> None:
    plan = plan_capacity(torch.tensor([[0], [0], [1]]), 2, 2)
    rows = torch.tensor([[1.0], [2.0], [float("nan")]])
    slots = gather_rows(rows, plan)
    assert slots[:2].tolist() == [[1.0], [2.0]] and slots[2].isnan().all() and slots[3] == 0
