"""The device mesh: who shards with whom, who holds whole copies."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stages.config import ParallelConfig
from stages.distributed import Process
from stages.errors import InputError


def check_world(config: ParallelConfig, world: int) -> None:
    """Raises InputError where `world` workers cannot be arranged as the configuration asks."""
    if config.replicate < 1 or world % config.replicate:
        raise InputError(
            f"parallel.replicate={config.replicate} with {world} workers: expected a divisor of the number of workers; "
            "change parallel.replicate or launch.workers"
        )
    if config.library == "torchtitan":
        from stages.parallel import titan

        titan.check_installed()


def build_mesh(config: ParallelConfig, process: Process) -> DeviceMesh | None:
    """`shard` alone (FSDP), or `replicate` x `shard` (HSDP); None for a single process.

    Neighbouring ranks shard, so that with one node a replica the heavy traffic stays inside the node.
    """
    check_world(config, process.world)
    if process.world == 1:
        return None
    if config.library == "torchtitan":
        from stages.parallel import titan

        return titan.build_mesh(config, process)
    kind = process.device.type
    if config.replicate == 1:
        return init_device_mesh(kind, (process.world,), mesh_dim_names=("shard",))
    shape = (config.replicate, process.world // config.replicate)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
