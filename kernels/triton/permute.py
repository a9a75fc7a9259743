"""Sending tokens to experts and back, for a GPU: `kernels.dispatch` in three kernels and without waiting for the device.

The same plan, moves and gradients as there (`gather_rows_plain` and `combine_rows_plain` are the specification), except
that sums are made in fp32 and rounded once. Every sum is over a token's choices in their order, by one program: no atomics.

Letters: T tokens, k choices a token, E experts, S slots, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.dispatch import DispatchPlan
from kernels.triton.backend import check_tensors, narrow, tl, triton


def plan_dropless(experts: Tensor, num_experts: int, *, block: int = 128) -> DispatchPlan:
    """Slots sorted by expert, then by token: a counting sort. `experts` int32 or int64 [T, k].

    A choice outside 0..E-1 is dropped: its slot is S, as many slots at the end are padding, and combining adds nothing for
    it. So a process that holds some of the experts can plan for those alone.
    """
    check_tensors(experts=experts)
    tokens, k = experts.shape
    pairs, flat = tokens * k, experts.reshape(-1)
    chunks = triton.cdiv(pairs, block)
    shape = {"EXPERTS": num_experts, "EXPERT_BLOCK": triton.next_power_of_2(num_experts), "BLOCK": block}
    counts = flat.new_zeros(num_experts, chunks)  # by expert, then by chunk: the running sum says where each chunk begins
    slot = torch.empty_like(flat, dtype=torch.int64)
    pair, token = torch.full_like(slot, pairs), torch.full_like(slot, tokens)
    if pairs:
        _count_kernel[(chunks,)](flat, counts, pairs, chunks, **shape)
        starts = (counts.view(-1).cumsum(0) - counts.view(-1)).to(flat.dtype)
        _place_kernel[(chunks,)](flat, starts, slot, pair, token, pairs, chunks, k, **shape)
    load = counts.sum(1, dtype=torch.int64)
    return DispatchPlan(token, pair, slot.view(tokens, k), load, load, pairs - load.sum())


def gather_rows(rows: Tensor, plan: DispatchPlan, *, block: tuple[int, int] = (16, 256)) -> Tensor:
    """Rows [T, D] in slots [S, D]; padding is zeros. `block`: rows and features a program."""
    check_tensors(rows=rows, slot=plan.slot)
    result: Tensor = _Gather.apply(rows, plan, block)
    return result


def combine_rows(slots: Tensor, mix: Tensor, plan: DispatchPlan, *, block: tuple[int, int] = (16, 256)) -> Tensor:
    """[T, D]: the sum over a token's choices of `mix` [T, k] times its slot's row; a dropped choice adds nothing."""
    check_tensors(slots=slots, mix=mix, slot=plan.slot)
    result: Tensor = _Combine.apply(slots, mix, plan, block)
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: DispatchPlan, block: tuple[int, int]) -> Tensor:
        ctx.plan, ctx.block = plan, block
        rows = rows.contiguous()
        result = rows.new_empty(len(plan.token), rows.shape[1])
        if result.numel():
            _gather_kernel[_grid(result, block)](
                rows, plan.token, result, len(result), len(rows), rows.shape[1], BLOCK_S=block[0], BLOCK_D=block[1]
            )
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return sum_choices(grad_outputs[0], None, ctx.plan.slot, ctx.block), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, mix: Tensor, plan: DispatchPlan, block: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(slots, mix)
        ctx.plan, ctx.block = plan, block
        return sum_choices(slots, mix, plan.slot, block)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slots, mix = (tensor.contiguous() for tensor in ctx.saved_tensors)
        plan, block, grad = ctx.plan, ctx.block, grad_outputs[0].contiguous()
        grad_slots, grad_mix = torch.empty_like(slots), torch.zeros_like(mix)  # what was dropped has no gradient
        if slots.numel():
            _combine_backward_kernel[(triton.cdiv(len(slots), block[0]),)](
                grad, slots, mix, plan.pair, grad_slots, grad_mix, len(slots), mix.numel(), mix.shape[1], slots.shape[1],
                BLOCK_S=block[0], BLOCK_D=block[1],
            )  # fmt: skip
        return grad_slots, grad_mix, None, None


def sum_choices(slots: Tensor, mix: Tensor | None, slot: Tensor, block: tuple[int, int] = (16, 256)) -> Tensor:
    """[T, D]: the sum over j = 0, 1, .. of `mix[t, j]` (None: 1) times row `slot[t, j]` of slots [S, D]; no gradient.

    An index of S adds nothing. fp32 inside, the type of `slots` outside.
    """
    slots = slots.contiguous()
    result = slots.new_empty(len(slot), slots.shape[1])
    if result.numel():
        _combine_kernel[_grid(result, block)](
            slots, slot if mix is None else mix.contiguous(), slot, result, len(result), len(slots), slots.shape[1],
            CHOICES=slot.shape[1], MIXED=mix is not None, BLOCK_T=block[0], BLOCK_D=block[1],
        )  # fmt: skip
    return result


def _grid(result: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    return triton.cdiv(len(result), block[0]), triton.cdiv(result.shape[1], block[1])


@triton.jit
def _count_kernel(
    experts_ptr, counts_ptr, pairs, chunks, EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    expert = tl.arange(0, EXPERT_BLOCK)
    count = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0)
    tl.store(counts_ptr + expert * chunks + tl.program_id(0), count, mask=expert < EXPERTS)


@triton.jit
def _place_kernel(
    experts_ptr, starts_ptr, slot_ptr, pair_ptr, token_ptr, pairs, chunks, k,
    EXPERTS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts_ptr + pair, mask=pair < pairs, other=-1).to(tl.int32)
    hit = chosen[:, None] == tl.arange(0, EXPERT_BLOCK)[None, :]
    # How many before this one in the chunk chose the same: what makes the sort stable.
    earlier = tl.sum(tl.where(hit, tl.cumsum(hit.to(tl.int32), 0) - 1, 0), 1)
    known = (chosen >= 0) & (chosen < EXPERTS)
    slot = tl.load(starts_ptr + chosen * chunks + tl.program_id(0), mask=known, other=0) + earlier
    tl.store(slot_ptr + pair, tl.where(known, slot, pairs).to(tl.int64), mask=pair < pairs)
    tl.store(pair_ptr + slot, pair.to(tl.int64), mask=known)
    tl.store(token_ptr + slot, (pair // k).to(tl.int64), mask=known)


@triton.jit
def _gather_kernel(
    rows_ptr, token_ptr, out_ptr, num_slots, num_tokens, features, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token = tl.load(token_ptr + slot, mask=slot < num_slots, other=num_tokens)
    inside = (d < features)[None, :]
    row = tl.load(rows_ptr + token[:, None] * features + d[None, :], mask=(token < num_tokens)[:, None] & inside, other=0.0)
    tl.store(out_ptr + slot.to(tl.int64)[:, None] * features + d[None, :], row, mask=(slot < num_slots)[:, None] & inside)


@triton.jit
def _combine_kernel(
    slots_ptr, mix_ptr, slot_ptr, out_ptr, num_tokens, num_slots, features,
    CHOICES: tl.constexpr, MIXED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < features)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for choice in tl.static_range(CHOICES):
        at = token * CHOICES + choice
        slot = tl.load(slot_ptr + at, mask=token < num_tokens, other=num_slots)
        here = (slot < num_slots)[:, None] & inside
        row = tl.load(slots_ptr + slot[:, None] * features + d[None, :], mask=here, other=0.0).to(tl.float32)
        if MIXED:
            # A dropped choice is left out, not multiplied by zero: its weight may be NaN.
            weight = tl.load(mix_ptr + at, mask=(token < num_tokens) & (slot < num_slots), other=0.0).to(tl.float32)
            row = row * weight[:, None]
        total += row
    out_at = out_ptr + token.to(tl.int64)[:, None] * features + d[None, :]
    tl.store(out_at, narrow(total, out_ptr.dtype.element_ty), mask=(token < num_tokens)[:, None] & inside)


@triton.jit
def _combine_backward_kernel(
    grad_ptr, slots_ptr, mix_ptr, pair_ptr, grad_slots_ptr, grad_mix_ptr, num_slots, num_pairs, k, features,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    pair = tl.load(pair_ptr + slot, mask=slot < num_slots, other=num_pairs)
    used = pair < num_pairs
    weight = tl.load(mix_ptr + pair, mask=used, other=0.0).to(tl.float32)
    product = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for start in range(0, features, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < features)[None, :]
        at = slot.to(tl.int64)[:, None] * features + d[None, :]
        grad_at = grad_ptr + (pair // k)[:, None] * features + d[None, :]
        grad = tl.load(grad_at, mask=used[:, None] & inside, other=0.0).to(tl.float32)
        row = tl.load(slots_ptr + at, mask=used[:, None] & inside, other=0.0).to(tl.float32)
        product += grad * row
        scaled = narrow(grad * weight[:, None], grad_slots_ptr.dtype.element_ty)
        tl.store(grad_slots_ptr + at, scaled, mask=(slot < num_slots)[:, None] & inside)
    tl.store(grad_mix_ptr + pair, narrow(tl.sum(product, 1), grad_mix_ptr.dtype.element_ty), mask=used)
