"""Sending tokens to experts and back: which row goes where, and the two moves with gradients that need no scatter.

Dimensions: T tokens, k experts a token, E experts, S slots (rows as the experts see them, sorted by expert), D features.
A slot knows its token, and each of a token's k choices knows its slot; so both moves, and both gradients, are gathers:
no row is added to by two others, and the order of every sum is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """Where the rows of one layer go."""

    token: Tensor
    """int64 [S]: the token in each slot; T, one past the last, where the slot is padding."""
    pair: Tensor
    """int64 [S]: the choice (token * k + rank) in each slot; T * k in padding."""
    slot: Tensor
    """int64 [T, k]: the slot of each choice; S where the choice was dropped."""
    counts: Tensor | None
    """int64 [E], slots of each expert; None where all have the same number."""
    load: Tensor
    """int64 [E]: choices of each expert, dropped ones included."""
    dropped: Tensor
    """int64 []: choices beyond an expert's capacity."""


def plan_dropless(experts: Tensor, num_experts: int) -> DispatchPlan:
    """Every choice finds a slot. `experts` int64 [T, k]; slots are sorted by expert, then by token."""
    tokens, k = experts.shape
    flat = experts.reshape(-1)
    pair = torch.sort(flat, stable=True).indices
    slot = torch.empty_like(pair)
    slot[pair] = torch.arange(len(pair), device=pair.device)
    load = torch.bincount(flat, minlength=num_experts)
    return DispatchPlan(pair // k, pair, slot.view(tokens, k), load, load, load.new_zeros(()))


def plan_capacity(experts: Tensor, num_experts: int, capacity: int) -> DispatchPlan:
    """`capacity` slots an expert, first come first served; unused ones are padding, choices beyond them are dropped."""
    tokens, k = experts.shape
    flat = experts.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    load = torch.bincount(flat, minlength=num_experts)
    place = torch.arange(len(flat), device=flat.device) - (load.cumsum(0) - load)[flat[order]]
    kept = place < capacity
    slots = num_experts * capacity
    slot = torch.full_like(flat, slots)
    slot[order] = torch.where(kept, flat[order] * capacity + place, slots)
    pair = torch.full((slots + 1,), tokens * k, device=flat.device)
    pair[slot] = torch.arange(len(flat), device=flat.device)  # dropped choices all go to the slot that is cut off
    pair = pair[:slots]
    return DispatchPlan(pair // k, pair, slot.view(tokens, k), None, load, (load - capacity).clamp(min=0).sum())


def gather_rows(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """Rows [T, D] in slots [S, D]; padding is zeros."""
    result: Tensor = _Gather.apply(rows, plan)
    return result


def combine_rows(slots: Tensor, mix: Tensor, plan: DispatchPlan) -> Tensor:
    """[T, D]: the sum over a token's choices of `mix` [T, k] times its slot's row; a dropped choice adds nothing."""
    result: Tensor = _Combine.apply(slots, mix, plan)
    return result


def gather_rows_plain(rows: Tensor, plan: DispatchPlan) -> Tensor:
    """The specification of `gather_rows`."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[plan.token]


def combine_rows_plain(slots: Tensor, mix: Tensor, plan: DispatchPlan) -> Tensor:
    """The specification of `combine_rows`."""
    padded = torch.cat([slots, slots.new_zeros(1, slots.shape[1])])
    return (padded[plan.slot] * mix.unsqueeze(-1).to(slots.dtype)).sum(1)


def _pick(rows: Tensor, index: Tensor, plan: DispatchPlan) -> Tensor:
    """rows[index]; zeros where the index is one past the last, as it can be in a plan with capacities."""
    if plan.counts is not None:
        return rows.index_select(0, index)
    picked = rows.index_select(0, index.clamp(max=len(rows) - 1))
    # NaN times 0 is NaN: what is not there is set, not multiplied away.
    return picked.masked_fill_((index == len(rows)).unsqueeze(-1), 0.0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.plan = plan
        return _pick(rows, plan.token, plan)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        plan, slot = ctx.plan, ctx.plan.slot
        # One choice after the other: all k at once would be k times the rows in memory.
        grad = _pick(grad_outputs[0], slot[:, 0], plan)
        for rank in range(1, slot.shape[1]):
            grad.add_(_pick(grad_outputs[0], slot[:, rank], plan))
        return grad, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, mix: Tensor, plan: DispatchPlan) -> Tensor:
        ctx.save_for_backward(slots, mix)
        ctx.plan = plan
        weights = mix.to(slots.dtype)
        result = _pick(slots, plan.slot[:, 0], plan).mul_(weights[:, :1])
        for rank in range(1, mix.shape[1]):
            result.addcmul_(_pick(slots, plan.slot[:, rank], plan), weights[:, rank : rank + 1])
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        slots, mix = ctx.saved_tensors
        plan, grad = ctx.plan, grad_outputs[0]
        rows = _pick(grad, plan.token, plan)
        grad_mix = None
        if ctx.needs_input_grad[1]:
            by_slot = (rows * slots).sum(-1, dtype=mix.dtype)
            padded = torch.cat([by_slot, by_slot.new_zeros(1)])
            grad_mix = padded[plan.slot]
        weights = torch.cat([mix.reshape(-1), mix.new_zeros(1)])[plan.pair].to(rows.dtype)
        return rows.mul_(weights.unsqueeze(-1)), grad_mix, None
