"""AdamW: which parameters decay, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from stages.config import OptimConfig

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW over `model`'s parameters. Matrices decay; norm weights (one axis) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One fused step takes tensors of one mesh: experts that are spread over workers have another than the rest.
    groups = [
        {"params": [p for p in part if (p.ndim >= 2) == matrices], "weight_decay": config.weight_decay if matrices else 0.0}
        for part in by_mesh(trainable) for matrices in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
    )  # fmt: skip


def by_mesh(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters apart by the device mesh that they are sharded over, in the order in which meshes appear."""
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state as `optim.<parameter>.<key>`, made (as before the first step) where there is none yet.

    The tensors are the optimizer's own: loading into them in place restores it.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            # What torch.optim.adamw._init_group makes for fused=True.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        tensors.update({f"optim.{name.removeprefix('model.')}.{key}": state[key] for key in STATE_KEYS})
    return tensors


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name; a tied one appears once."""
    return dict(model.named_parameters())
