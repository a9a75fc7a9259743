"""The device mesh: who shards with whom, who holds whole copies, who holds which experts."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modeling.config import ModelConfig
from stages.config import ParallelConfig
from stages.distributed import Process
from stages.errors import InputError


def check_world(config: ParallelConfig, world: int, model: ModelConfig | None = None) -> None:
    """Raises InputError where `world` workers cannot be arranged as the configuration asks for such a model."""
    if config.replicate < 1 or world % config.replicate:
        raise InputError(
            f"parallel.replicate={config.replicate} with {world} workers: expected a divisor of the number of workers; "
            "change parallel.replicate or launch.workers"
        )
    if config.expert > 1:
        _check_experts(config, world // config.replicate, model)
    if config.library == "torchtitan":
        from stages.parallel import titan

        titan.check_installed()


def _check_experts(config: ParallelConfig, sharding: int, model: ModelConfig | None) -> None:
    size = config.expert
    if sharding % size:
        raise InputError(f"parallel.expert={size} with {sharding} workers that shard: expected a divisor; change "
                         "parallel.expert, parallel.replicate or launch.workers")
    if config.library == "torchtitan":
        raise InputError(f"parallel.expert={size} with parallel.library=torchtitan: its mesh is laid out for sharding only; "
                         "set parallel.library=torch")
    if model is None:
        return
    if model.moe is None:
        raise InputError(f"parallel.expert={size}, but the model has no experts; set parallel.expert=1")
    if model.moe.num_experts % size:
        raise InputError(f"parallel.expert={size} does not divide model.moe.num_experts={model.moe.num_experts}: every worker "
                         "holds as many; use a divisor")
    # Experts are sharded along their input axis, which must come out even: the first axis is taken by the experts.
    for name, width in (("hidden_size", model.hidden_size), ("moe.expert_size", model.moe.expert_size)):
        if width % (sharding // size):
            raise InputError(f"model.{name}={width} cannot be sharded evenly over {sharding // size} workers; use a larger "
                             "parallel.expert or parallel.replicate")


def build_mesh(config: ParallelConfig, process: Process) -> DeviceMesh | None:
    """`shard` alone (FSDP), or `replicate` x `shard` (HSDP); None for a single process.

    Neighbouring ranks shard, so that with one node a replica the heavy traffic stays inside the node. With expert
    parallelism `shard` is `expert_shard` x `expert`, flattened: neighbours exchange tokens.
    """
    check_world(config, process.world)
    if process.world == 1:
        return None
    if config.library == "torchtitan":
        from stages.parallel import titan

        return titan.build_mesh(config, process)
    kind = process.device.type
    if config.expert > 1:
        sizes = {"replicate": config.replicate, "expert_shard": process.world // config.replicate // config.expert,
                 "expert": config.expert}
        if config.replicate == 1:
            del sizes["replicate"]
        mesh = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        mesh["expert_shard", "expert"]._flatten("shard")
        return mesh
    if config.replicate == 1:
        return init_device_mesh(kind, (process.world,), mesh_dim_names=("shard",))
    shape = (config.replicate, process.world // config.replicate)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def dense_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of `build_mesh`'s that shards whatever is no expert."""
    names = mesh.mesh_dim_names or ()
    if "expert" not in names:
        return mesh
    return mesh["replicate", "shard"] if "replicate" in names else mesh["shard"]


def expert_meshes(mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh] | None:
    """(what shards an expert, who holds which experts); None without expert parallelism."""
    names = mesh.mesh_dim_names or ()
    if "expert" not in names:
        return None
    sharding = mesh["replicate", "expert_shard"] if "replicate" in names else mesh["expert_shard"]
    return sharding, mesh["expert"]
