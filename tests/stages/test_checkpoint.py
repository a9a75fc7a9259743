"""Checkpoints on one process: what was saved comes back, a killed or failed save leaves nothing, damage is named."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages import checkpoint_files, checkpoint_writer
from stages.checkpoint import (
    CheckpointWriter,
    committed,
    latest,
    load_full,
    load_tensors,
    read_document,
    resolve,
    tensor_names,
    verify,
)
from stages.config import CheckpointConfig
from stages.errors import CheckpointError, RunError

DOCUMENTS: dict[str, dict | bytes] = {"state": {"step": 1, "stage": "pretrain"}, "tokenizer.json": b'{"model": {}}'}


def sample(seed: int = 0) -> dict[str, Tensor]:
    """One of each kind that a training state has."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4, generator=draw)
    return {
        "model.embed.weight": weight,
        "model.norm.weight": torch.randn(4, generator=draw).to(torch.bfloat16),
        "optim.embed.weight.exp_avg": torch.randn(4, 6, generator=draw).t(),  # not contiguous
        "optim.embed.weight.step": torch.tensor(7.0 + seed),
        "loader.position": torch.tensor([2**40 + seed, -1]),
        "rng.0": torch.randint(0, 256, (5056,), generator=draw, dtype=torch.uint8),
    }


def blanks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def save(root: Path, step: int = 1, tensors: dict[str, Tensor] | None = None, **options: object) -> Path:
    writer = CheckpointWriter(root, CheckpointConfig(**options))  # type: ignore[arg-type]
    writer.save(step, sample() if tensors is None else tensors, DOCUMENTS)
    writer.wait()
    return root / f"step-{step:06d}"


def assert_holds(path: Path, expected: dict[str, Tensor]) -> None:
    verify(path)
    read = blanks(expected)
    load_tensors(path, read)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path, asynchronous: bool) -> None:
    path = save(tmp_path, asynchronous=asynchronous)
    assert_holds(path, sample())
    assert tensor_names(path) == sorted(sample())
    assert read_document(path, "state") == DOCUMENTS["state"]
    assert (path / "tokenizer.json").read_bytes() == DOCUMENTS["tokenizer.json"]
    whole = load_full(path, "model.")
    assert whole.keys() == {"embed.weight", "norm.weight"}
    assert torch.equal(whole["embed.weight"], sample()["model.embed.weight"])


def test_a_save_in_the_background_holds_the_state_at_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = CheckpointWriter._write

    def write_late(self: CheckpointWriter, *args: object) -> None:
        assert gate.wait(timeout=30)
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "_write", write_late)
    writer, tensors = CheckpointWriter(tmp_path, CheckpointConfig()), sample()
    writer.save(1, tensors, DOCUMENTS)
    for tensor in tensors.values():
        tensor.zero_()
    assert committed(tmp_path) == []
    gate.set()
    writer.wait()
    assert_holds(tmp_path / "step-000001", sample())


def test_only_the_newest_are_kept_in_order_of_their_steps(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointConfig(keep=2))
    for step in (8, 9, 10, 1_000_000):
        writer.save(step, sample(step), DOCUMENTS)
    writer.wait()
    assert [path.name for path in committed(tmp_path)] == ["step-000010", "step-1000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    assert_holds(tmp_path / "step-000010", sample(10))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, tensors=sample(0) | {"model.gone": torch.ones(3)})
    assert_holds(save(tmp_path, tensors=sample(1)), sample(1))
    assert "model.gone" not in tensor_names(tmp_path / "step-000001")


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning_not_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, step=1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert_holds(save(tmp_path, step=2, tensors=sample(2), keep=1), sample(2))
    assert "could not remove" in caplog.text and "step-000001" in caplog.text


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the writer's own handles it."""


@pytest.mark.parametrize("moment", ["after the shards", "in the documents", "before the mark", "in a removal"])
def test_a_kill_at_any_moment_leaves_what_was_committed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    old = save(tmp_path, step=1)

    def die(*_: object, **__: object) -> None:
        raise Killed

    durably = checkpoint_writer.write_durably
    with monkeypatch.context() as patch:
        if moment == "after the shards":
            patch.setattr(CheckpointWriter, "_commit", die)
        elif moment == "in the documents":
            patch.setattr(checkpoint_writer, "write_durably", die)
        elif moment == "before the mark":
            patch.setattr(checkpoint_writer, "write_durably",
                          lambda file, data: die() if "commit" in file.name else durably(file, data))  # fmt: skip
        else:
            patch.setattr(shutil, "rmtree", die)
        writer = CheckpointWriter(tmp_path, CheckpointConfig(keep=1))
        with pytest.raises(Killed):
            writer.save(2, sample(2), DOCUMENTS)
            writer.wait()

    cut_short = tmp_path / "step-000002"
    if moment == "in a removal":  # the new one was committed, and the old one is no longer
        assert committed(tmp_path) == [cut_short]
        assert_holds(cut_short, sample(2))
        CheckpointWriter(tmp_path, CheckpointConfig())
        assert not old.exists()
        return
    assert list(cut_short.glob("*.safetensors"))
    assert latest(tmp_path) == old == resolve(tmp_path)
    assert_holds(old, sample())
    with pytest.raises(CheckpointError, match="step-000002 was not committed.*cut short.*step-000001"):
        resolve(cut_short)
    with pytest.raises(CheckpointError, match="commit.json is missing"):
        verify(cut_short)
    CheckpointWriter(tmp_path, CheckpointConfig())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"]


def test_cleaning_up_removes_nothing_that_a_writer_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / "step-000009.txt").write_text("notes")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "step-000007").symlink_to(elsewhere, target_is_directory=True)
    (tmp_path / "step-000003").mkdir()
    CheckpointWriter(tmp_path, CheckpointConfig())
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["elsewhere", "step-000007", "step-000009.txt", "step-by-step"]


def test_a_failed_save_is_told_at_the_next_call_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, step=1)
    writer = CheckpointWriter(tmp_path, CheckpointConfig())

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)  # torch's own writer of the shards comes upon it
        writer.save(2, sample(2), DOCUMENTS)
        with pytest.raises(RunError, match=r"step-000002 was not .* disk is full \(\d+ bytes free\).*step-000001"):
            writer.save(3, sample(3), DOCUMENTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001"]
    assert_holds(old, sample())
    writer.save(3, sample(3), DOCUMENTS)
    writer.wait()
    assert_holds(tmp_path / "step-000003", sample(3))


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", CheckpointConfig(asynchronous=False))
    with pytest.raises(RunError, match="step-000001 was not written .*no older one") as caught:
        writer.save(1, sample(), DOCUMENTS)
    assert "\n" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 2 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_earlier_checkpoint_and_says_how_much_was_free(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    old = save(root, step=1)
    writer = CheckpointWriter(root, CheckpointConfig())
    writer.save(2, {"model.big": torch.ones(1024, 1024)}, DOCUMENTS)
    with pytest.raises(RunError) as caught:
        writer.wait()
    assert f"{root / 'step-000002'} was not written: the disk is full" in str(caught.value)
    assert "last checkpoint is step-000001" in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in root.iterdir()) == ["step-000001"]
    assert_holds(old, sample())
    writer.save(3, sample(3), DOCUMENTS)
    writer.wait()
    assert_holds(root / "step-000003", sample(3))


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "bit flipped"])
def test_a_damaged_file_is_named_before_anything_is_loaded(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path)
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[-3] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path}.{name}.*damaged"):
        verify(path)


@pytest.mark.parametrize("content", ["", "[]", '{"files": {"../x": {"bytes": 1, "sha256": "0"}}}', '{"files": {}}'])
def test_a_damaged_commit_mark_is_named(tmp_path: Path, content: str) -> None:
    path = save(tmp_path)
    (path / "commit.json").write_text(content)
    with pytest.raises(CheckpointError, match="commit.json|not in its commit"):
        verify(path)


def test_a_shard_of_nobody_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    other = save(tmp_path / "other", tensors=sample(5))
    shutil.copy(next(other.glob("*.safetensors")), path / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="shard-00002.*not in its commit"):
        verify(path)


def test_a_shard_with_a_damaged_header_is_refused_even_where_its_hash_was_redone(tmp_path: Path) -> None:
    path = save(tmp_path)
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(b"\xff" * 64)
    commit = json.loads((path / "commit.json").read_text())
    commit["files"][shard.name] = {"bytes": 64, "sha256": checkpoint_files.file_hash(shard)}
    (path / "commit.json").write_text(json.dumps(commit))
    verify(path)
    for read in (tensor_names, load_full, lambda path: load_tensors(path, blanks(sample()))):
        with pytest.raises(CheckpointError, match="step-000001 cannot be read"):
            read(path)


class Bomb:
    """Unpickling it makes the folder `path`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_planted_pickle_is_never_run(tmp_path: Path) -> None:
    path = save(tmp_path)
    gone_off = tmp_path / "gone-off"
    bomb = pickle.dumps(Bomb(str(gone_off)))
    for name in (".metadata", "__0_0.distcp", "extra.pt", "model.bin"):
        (path / name).write_bytes(bomb)
    assert_holds(path, sample())
    load_full(path)
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(bomb)
    with pytest.raises(CheckpointError, match="damaged"):
        verify(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_full(path)
    with pytest.raises(CheckpointError, match="tokenizer.json|cannot be read|damaged"):
        (path / "state.json").write_bytes(bomb)
        read_document(path, "state")
    assert not gone_off.exists()


def test_tensors_of_another_model_are_refused_with_their_name(tmp_path: Path) -> None:
    path = save(tmp_path)
    target = {"model.embed.weight": torch.zeros(6, 4), "model.other": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="no tensor model.other; .*another model"):
        load_tensors(path, target)
    with pytest.raises(CheckpointError, match=r"model.embed.weight is \(6, 4\), the model has \(4, 6\)"):
        load_tensors(path, {"model.embed.weight": torch.zeros(4, 6)})
    assert not target["model.embed.weight"].any()
    with pytest.raises(CheckpointError, match="no document optimizer"):
        read_document(path, "optimizer")


def test_a_path_means_the_newest_checkpoint_of_the_last_stage(tmp_path: Path) -> None:
    pretrain = save(tmp_path / "run" / "pretrain" / "checkpoints", step=5)
    sft = save(tmp_path / "run" / "sft" / "checkpoints", step=2)
    (tmp_path / "run" / "qat" / "checkpoints" / "step-000009").mkdir(parents=True)
    assert resolve(tmp_path / "run") == sft
    assert resolve(str(tmp_path / "run" / "pretrain")) == pretrain
    assert resolve(tmp_path / "run" / "pretrain" / "checkpoints") == pretrain == resolve(pretrain)
    with pytest.raises(CheckpointError, match="qat holds no committed checkpoint"):
        resolve(tmp_path / "run" / "qat")
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(tmp_path / "run2")
    with pytest.raises(CheckpointError, match="commit.json: .*expected a run, a stage or a checkpoint folder"):
        resolve(sft / "commit.json")


def test_the_space_told_is_what_was_free_when_the_disk_ran_full(small_disk: Path) -> None:
    (small_disk / "others").write_bytes(bytes(1_500_000))
    writer = CheckpointWriter(small_disk / "checkpoints", CheckpointConfig(asynchronous=False))
    with pytest.raises(RunError, match=r"\((\d+) bytes free\)") as caught:
        writer.save(1, {"model.big": torch.ones(1024, 1024)}, DOCUMENTS)
    free = int(str(caught.value).partition("full (")[2].split()[0])
    assert free < 65_536 < shutil.disk_usage(small_disk).free
