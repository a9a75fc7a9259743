"""How a Ray Train worker group learns its rendezvous, without torch in the driver or the controller.

Ray's own `TorchConfig` imports torch wherever it is unpickled: in the driver, in the controller, in every helper
actor. This backend only hands out the environment variables that `torch.distributed` reads (`env://`).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class LeanTrainer(DataParallelTrainer):
    """Ray Train's trainer less two helper actors that we have no use for; each imports Ray Train in a process of its own.

    One hands out Ray datasets, of which there are none here. The other frees the placement group of a driver that died;
    a head of our own dies with the driver.
    """

    def _create_default_callbacks(self) -> list[Any]:
        dropped: tuple[type, ...] = (DatasetsCallback,)
        if not os.environ.get("RAY_ADDRESS"):
            dropped = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, dropped)]


@dataclass
class GroupConfig(BackendConfig):
    """Ray Train's handle on `_GroupBackend`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _GroupBackend


class _GroupBackend(Backend):
    share_cuda_visible_devices = True  # NCCL's peer access wants all GPUs of a node in sight

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        worker_group.execute(_export_rendezvous, address, port)


def _free_address() -> tuple[str, int]:
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _export_rendezvous(address: str, port: int) -> None:
    import ray.train

    context = ray.train.get_context()
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
    )
