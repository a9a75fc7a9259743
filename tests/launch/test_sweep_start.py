"""What is refused before a search owns a directory, and what a resumed one refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launch import sweep
from launch.sweep_config import load_sweep, save_sweep
from launch.sweep_run import DATABASE
from search.store import Store
from stages.errors import CheckpointError, InputError, RunError


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    sweep.main()


def test_a_backbone_that_is_not_there_is_told_before_the_directory_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        start(monkeypatch, "--recipe", "smoke_search", "--quality.backbone", str(tmp_path / "none"), "--output-dir",
              str(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_two_modelled_devices_are_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="device model:oneplus_12 is a model, named beside others"):
        start(monkeypatch, "--recipe", "smoke_search", "--device", "model:oneplus_12", "--device", "model:raspberry_pi_5",
              "--output-dir", str(tmp_path / "out"))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_missing_runtime_is_one_line_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import runtime

    def missing() -> None:
        raise runtime.RuntimeLibraryError("libpocketforge.so is not there")

    monkeypatch.setattr(runtime, "library", missing)
    with pytest.raises(RunError, match=r"libpocketforge\.so is not there"):
        start(monkeypatch, "--recipe", "smoke_search", "--output-dir", str(tmp_path / "out"))


def test_fewer_trials_than_there_are_is_refused_and_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_sweep("smoke_search", {})
    save_sweep(recipe, tmp_path / "sweep.toml")
    with Store.open(tmp_path / DATABASE, recipe.comparable()) as store:
        store.add_trials([("one", {"x": 1}), ("two", {"x": 2})])
    before = (tmp_path / "sweep.toml").read_text()
    with pytest.raises(InputError, match="--trials 1, but this sweep has 2 already"):
        start(monkeypatch, "resume", str(tmp_path), "--trials", "1")
    assert (tmp_path / "sweep.toml").read_text() == before
