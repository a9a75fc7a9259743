"""The one place that knows torchtitan (0.2.2): its mesh and its gradient clipping. `docs/` says why only these.

torchtitan is optional. It imports triton at load without declaring it, and binds the device type when it is imported
(`cuda` where there is no accelerator), so both are seen to here, before anything of it is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from stages.config import ParallelConfig
from stages.distributed import Process
from stages.errors import InputError

VERSION = "0.2.2"


def build_mesh(config: ParallelConfig, process: Process) -> DeviceMesh:
    """The mesh that torchtitan's `ParallelDims` lays out for FSDP or HSDP."""
    dims = _import("torchtitan.distributed", process.device).ParallelDims(
        dp_replicate=config.replicate, dp_shard=process.world // config.replicate, cp=1, tp=1, pp=1, ep=1, etp=1,
        world_size=process.world,
    )  # fmt: skip
    return dims.get_mesh(["dp_replicate", "fsdp"] if config.replicate > 1 else "fsdp")


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """torchtitan's `clip_grad_norm_`: the global norm over DTensors, before clipping. 0 does not clip."""
    utils = _import("torchtitan.distributed.utils", parameters[0].device)
    return utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"), foreach=True)


def check_installed() -> None:
    """Raises InputError where torchtitan is missing or of another version."""
    try:
        found = importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        raise _cannot_load("it is not installed") from None
    if found != VERSION:
        raise InputError(f"parallel.library=torchtitan found version {found}; expected {VERSION}: pip install "
                         f"torchtitan=={VERSION}, or set parallel.library=torch")  # fmt: skip


def _cannot_load(why: str) -> InputError:
    return InputError(
        f"parallel.library=torchtitan cannot be loaded ({why}); pip install torchtitan=={VERSION} triton "
        "(the triton of your torch: 3.6.0 for 2.11, 3.7.1 for 2.13), or set parallel.library=torch"
    )


def _import(name: str, device: torch.device) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    check_installed()
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise _cannot_load(str(error)) from None
    _set_device_type(device)
    return module


def _set_device_type(device: torch.device) -> None:
    """torchtitan copies `device_type` into its modules at import; correct every copy."""
    if device.type != "cpu":
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan") and isinstance(module, ModuleType) and hasattr(module, "device_type"):
            vars(module)["device_type"] = "cpu"
