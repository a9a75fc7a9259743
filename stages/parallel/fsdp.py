"""Sharding, mixed precision, recomputation and compilation of a finished model, in that model's own terms.

The order matters: what recomputes is compiled, and what is compiled is sharded, so that FSDP's hooks stay outside both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from stages.balance import moe_layers
from stages.config import ParallelConfig
from stages.objectives import TeacherModel, TrainableModel
from stages.optim import by_mesh
from stages.parallel.expert import spread_experts
from stages.parallel.mesh import dense_mesh, expert_meshes


def parallelize(module: TrainableModel | TeacherModel, config: ParallelConfig, mesh: DeviceMesh | None) -> None:
    """Prepare `module` in place; parameter names do not change.

    Without a mesh nothing is sharded, and bf16 is autocast's business (`compute_context`). Gradients come out as the
    SUM over workers: the loss is divided by the global number of supervised tokens before the backward pass, and
    FSDP's own average would divide once more (and gloo has no scaled sum).
    """
    trained = isinstance(module, TrainableModel)
    blocks = list(module.model.blocks)
    for block in blocks:
        if trained and config.activation_checkpointing == "block":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.compile:
            block.compile()
    if mesh is None:
        return
    policy = MixedPrecisionPolicy()
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    experts = expert_meshes(mesh)
    mesh = dense_mesh(mesh)
    for layer in moe_layers(module.model):
        if experts is not None:
            spread_experts(layer.experts, *experts, policy, config.reshard_after_forward)
        # Routers stay fp32 whatever the rest computes in: a rounded logit moves a token to another expert.
        fully_shard(layer.router, mesh=mesh, reshard_after_forward=config.reshard_after_forward)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The root holds the embedding (and tied head): used first and last, so it stays gathered. A teacher's must stay,
    # because the student's loss reads its head after its forward pass.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for part in _sharded(module):
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


def compute_context(config: ParallelConfig, mesh: DeviceMesh | None, device: torch.device) -> AbstractContextManager:
    """What a forward pass runs under: bf16 autocast on a single process, nothing where FSDP casts."""
    if mesh is None and config.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass reduces gradients over workers, or keeps them for the next micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(enabled)


def reshard(module: nn.Module) -> None:
    """Free gathered parameters. A forward pass without a backward pass leaves the root's in place of its shards."""
    for part in _sharded(module):
        part.reshard()


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients to a global norm of at most `max_norm` (0 leaves them); returns the norm before, a scalar.

    The norm of sharded gradients is that of the whole: every rank gets the same number.
    """
    groups = by_mesh(parameters)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None], foreach=True) for group in groups]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))
    if max_norm > 0:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=True)
    return norm


def gradient_clipper(config: ParallelConfig) -> Callable[[list[nn.Parameter], float], Tensor]:
    """`clip_gradients`, or torchtitan's function for the same."""
    if config.library == "torchtitan":
        from stages.parallel import titan

        return titan.clip_gradients
    return clip_gradients


def _sharded(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]
