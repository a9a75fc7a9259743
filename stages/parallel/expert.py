"""Experts spread over workers: each holds a part of every layer's, and tokens travel to them and back.

Rows come sorted by expert (`kernels.dispatch`), and a worker's experts are neighbours, so what goes to one worker is one
piece. The first all-to-all says how many rows come, the second brings them; a third, the other way, brings results.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from modeling.experts import Experts


def spread_experts(
    experts: Experts, sharding: DeviceMesh, holders: DeviceMesh, policy: MixedPrecisionPolicy, reshard: bool
) -> None:
    """Leave each worker along `holders` its part of the experts, sharded over `sharding`; names do not change.

    The parameters are DTensors of the global shape: a checkpoint of them holds all experts, whoever wrote it.
    """
    for name, parameter in list(experts.named_parameters(recurse=False)):
        # Every worker has the same whole tensor (or none yet, on the meta device) and keeps its own part.
        part = distribute_tensor(parameter.detach(), holders, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    experts.forward = partial(_forward, experts, holders.get_group())  # type: ignore[method-assign]
    # Along the inputs: the first axis, the experts', is divided already.
    fully_shard(experts, mesh=sharding, mp_policy=policy, reshard_after_forward=reshard, shard_placement_fn=lambda _: Shard(1))


def _forward(experts: Experts, group: dist.ProcessGroup, rows: Tensor, counts: Tensor | None) -> Tensor:
    gate_up, down = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in (experts.gate_up, experts.down))
    held, workers = len(gate_up), dist.get_world_size(group)
    if counts is None:
        return _even(experts, group, rows, gate_up, down)
    table = torch.empty_like(counts)
    dist.all_to_all_single(table, counts.contiguous(), group=group)
    coming = table.view(workers, held)  # rows from each worker for each of our experts
    sent, received = counts.view(workers, held).sum(1).tolist(), coming.sum(1).tolist()
    arrived = _Exchange.apply(rows, received, sent, group)
    order = _by_expert(coming)
    results = experts.compute(arrived[order], coming.sum(0), gate_up, down)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    returned: Tensor = _Exchange.apply(results[back], sent, received, group)
    return returned


def _even(experts: Experts, group: dist.ProcessGroup, rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """With capacities all pieces have the same size, and nothing has to be asked first."""
    held, workers = len(gate_up), dist.get_world_size(group)
    arrived = _Exchange.apply(rows, None, None, group).view(workers, held, -1, rows.shape[-1])
    results = experts.compute(arrived.transpose(0, 1).reshape(-1, rows.shape[-1]), None, gate_up, down)
    sorted_back = results.view(held, workers, -1, results.shape[-1]).transpose(0, 1).reshape(-1, results.shape[-1])
    returned: Tensor = _Exchange.apply(sorted_back, None, None, group)
    return returned


def _by_expert(coming: Tensor) -> Tensor:
    """Where each row stands in what arrived (by worker, then expert), listed by expert, then worker."""
    workers, held = coming.shape
    expert = torch.arange(held, device=coming.device).repeat(workers).repeat_interleave(coming.reshape(-1))
    return torch.sort(expert, stable=True).indices


class _Exchange(torch.autograd.Function):
    """All-to-all of rows; its gradient goes the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _all_to_all(rows, received, sent, group)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad_outputs[0], ctx.sent, ctx.received, ctx.group), None, None, None


def _all_to_all(rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    result = rows.new_empty(len(rows) if received is None else sum(received), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result
