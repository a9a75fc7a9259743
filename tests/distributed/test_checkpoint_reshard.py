"""A checkpoint of N workers is read by M, saved while training goes on; one worker's failure is everyone's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from stages import checkpoint_writer
from stages.checkpoint import CheckpointWriter, committed, load_full, load_tensors, tensor_names, verify
from stages.config import CheckpointConfig
from stages.errors import CheckpointError, RunError
from tests.helpers.distributed import run_distributed

SHAPES = {"embed": (13, 4), "norm": (3,), "one": (1, 5), "wide": (8, 6)}  # even, uneven, and fewer rows than workers
DOCUMENTS = {"state": {"step": 1}}


def whole(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"model.{name}": torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def sharded(seed: int, rank: int, world: int, replicate: int = 1) -> dict[str, Tensor]:
    """The state as a rank holds it under FSDP (or HSDP): shards, a scalar that all have, its own random state."""
    if replicate == 1:
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh("cpu", (replicate, world // replicate))
    placements = [Shard(0)] if replicate == 1 else [Replicate(), Shard(0)]
    state: dict[str, Tensor] = {
        name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole(seed).items()
    }
    state["optim.embed.step"] = torch.tensor(float(seed))
    state[f"rng.{rank}"] = torch.full((16,), rank + 1, dtype=torch.uint8)
    return state


def assert_loads_as(path: Path, seed: int, rank: int, world: int, replicate: int = 1) -> None:
    verify(path, rank, world)
    state = sharded(seed, rank, world, replicate)
    expected = {name: tensor.detach().clone() for name, tensor in state.items()}
    known = set(tensor_names(path))
    targets = {name: tensor for name, tensor in state.items() if name in known}
    for tensor in targets.values():
        tensor.zero_()
    load_tensors(path, targets)
    for name, tensor in targets.items():
        mine, wanted = (getattr(item, "to_local", lambda item=item: item)() for item in (tensor, expected[name]))
        assert torch.equal(mine, wanted), name


def _two_save_in_the_background_while_training(root: Path, rank: int, world: int) -> None:
    state = sharded(1, rank, world)
    writer = CheckpointWriter(root, CheckpointConfig(), rank, world)
    writer.save(1, state, DOCUMENTS)
    for _ in range(200):  # collectives of training, on their own group
        dist.all_reduce(torch.ones(1000))
        for tensor in state.values():
            tensor.add_(1)
    writer.wait()
    assert_loads_as(root / "step-000001", 1, rank, world)


def _a_failure_on_one_is_told_to_all(root: Path, rank: int, world: int) -> str:
    writer = CheckpointWriter(root, CheckpointConfig(), rank, world)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            def full(file: Path) -> dict[str, object]:
                raise OSError(28, "No space left on device", str(file))

            patch.setattr(checkpoint_writer, "file_entry", full)
        writer.save(2, sharded(2, rank, world), DOCUMENTS)
        with pytest.raises(RunError) as failed:
            writer.wait()
    dist.barrier()
    assert [path.name for path in committed(root)] == ["step-000001"]
    assert not (root / "step-000002").exists()
    writer.save(3, sharded(3, rank, world), DOCUMENTS)
    writer.wait()
    assert_loads_as(root / "step-000003", 3, rank, world)
    return str(failed.value)


def _folders_that_are_not_one_are_refused(root: Path, rank: int, world: int) -> str:
    writer = CheckpointWriter(root / f"machine-{rank}", CheckpointConfig(), rank, world)
    writer.save(1, sharded(2, rank, world), DOCUMENTS)
    with pytest.raises(RunError) as refused:
        writer.wait()
    assert committed(writer.root) == []
    return str(refused.value).partition(" not written ")[2]


def _damage_is_found_by_all(root: Path, rank: int, world: int) -> str:
    path = root / "step-000003"
    if rank == 0:
        shard = sorted(path.glob("*.safetensors"))[1]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    dist.barrier()
    with pytest.raises(CheckpointError) as found:
        verify(path, rank, world)
    return str(found.value)


def _on_two(root: Path, of_one: Path, rank: int, world: int) -> tuple[str, str, str]:
    assert_loads_as(of_one, 0, rank, world)
    _two_save_in_the_background_while_training(root, rank, world)
    return (
        _a_failure_on_one_is_told_to_all(root, rank, world),
        _damage_is_found_by_all(root, rank, world),
        _folders_that_are_not_one_are_refused(root.parent / "apart", rank, world),
    )


def _on_four(of_two: Path, root: Path, rank: int, world: int) -> None:
    assert_loads_as(of_two, 1, rank, world)
    assert_loads_as(of_two, 1, rank, world, replicate=2)
    writer = CheckpointWriter(root, CheckpointConfig(), rank, world)
    writer.save(1, sharded(4, rank, world), DOCUMENTS)
    writer.save(2, sharded(5, rank, world, replicate=2), DOCUMENTS)
    writer.wait()


def _on_two_again(root: Path, rank: int, world: int) -> None:
    assert_loads_as(root / "step-000001", 4, rank, world)
    assert_loads_as(root / "step-000002", 5, rank, world)


def assert_whole(path: Path, seed: int, world: int) -> None:
    verify(path)
    read, expected = load_full(path, "model."), whole(seed)
    assert read.keys() == set(SHAPES)
    assert all(torch.equal(read[name.removeprefix("model.")], tensor) for name, tensor in expected.items())
    assert {f"rng.{rank}" for rank in range(world)} <= set(tensor_names(path))
    step = torch.zeros(())
    load_tensors(path, {"optim.embed.step": step})
    assert step.item() == seed


def test_workers_of_any_number_read_what_others_wrote(tmp_path: Path) -> None:
    one, two, four = (tmp_path / name for name in ("one", "two", "four"))
    writer = CheckpointWriter(one, CheckpointConfig())
    writer.save(1, {**whole(0), "optim.embed.step": torch.tensor(0.0), "rng.0": torch.ones(16).byte()}, DOCUMENTS)
    writer.wait()

    messages = run_distributed(_on_two, 2, args=(two, one / "step-000001"), timeout_s=60)
    (failure, damage, apart), other = messages
    assert other == (failure, damage, apart)
    assert "one folder that all machines share" in apart
    assert "step-000002 was not written: the disk is full" in failure and "step-000001" in failure
    assert "shard-00002" in damage and "SHA-256" in damage
    assert_whole(two / "step-000001", 1, world=2)

    run_distributed(_on_four, 4, args=(two / "step-000001", four), timeout_s=90)
    assert_whole(four / "step-000001", 4, world=4)
    assert_whole(four / "step-000002", 5, world=4)
    run_distributed(_on_two_again, 2, args=(four,), timeout_s=60)
