"""A search on Ray: several scoring processes on one head, and devices of a cluster by name."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray

from launch.config import LaunchConfig
from launch.ray_head import shared_cluster
from launch.search_quality import PrunedTraining
from launch.sweep_config import DeviceConfig, GoalConfig, QualityConfig, SweepRecipe, save_sweep
from launch.sweep_score import CandidateScorer
from search.devices import MeasureRequest, open_device
from stages.config import OptimConfig
from stages.errors import InputError
from tests.helpers.pruned_training import pruned_training
from tests.helpers.stage_jobs import MODEL, pretrain_job, run_job


def heads() -> int:
    """Ray heads that this process or one of its children started."""
    children = psutil.Process().children(recursive=True)
    return sum("gcs_server" in " ".join(child.cmdline()[:1]) for child in children if child.is_running())


def test_a_device_on_ray_needs_a_cluster_by_name(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="device ray://bench/local: RAY_ADDRESS names no cluster; set it"):
        open_device("ray://bench/local")
    for wrong in ("ray://bench", "ray://bench/"):
        with pytest.raises(ValueError, match="expected one of .*ray://RESOURCE/DEVICE"):
            open_device(wrong)


def test_a_search_of_one_worker_starts_no_head(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with shared_cluster(LaunchConfig(), 4):
        assert "RAY_ADDRESS" not in os.environ and not ray.is_initialized()


def diverging(training: PrunedTraining, workers: LaunchConfig) -> PrunedTraining:
    assert training.recipe.pretrain is not None
    wild = replace(training.recipe.pretrain, optim=OptimConfig(lr=1e30))
    return replace(training, recipe=replace(training.recipe, launch=workers, pretrain=wild))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("POCKETFORGE_SLOW_TESTS"),
                    reason="three trainings on a Ray head of its own take two minutes; POCKETFORGE_SLOW_TESTS=1 runs it")
def test_scoring_processes_share_one_head_divergence_comes_back_as_such_and_devices_are_found(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    model = replace(MODEL, num_kv_heads=2)  # a packed file has no narrower keys than 32
    run_job(pretrain_job(tmp_path, steps=30, lr=1e-2, model=model))
    training = pruned_training(tmp_path, tmp_path / "unused")
    workers = LaunchConfig(workers=1, runner="ray", cpus_per_worker=0.5, threads_per_worker=1)
    space = {"num_layers": [1, 2], "hidden_size": [32], "ffn_size": [32, 64], "num_heads": [2], "num_kv_heads": [2]}
    sweep = SweepRecipe(
        name="tiny", recipe=replace(training.recipe, model=model, launch=workers), space=space,
        goal=GoalConfig(ttft_ms=4.0, loss=6.0),
        quality=QualityConfig(backbone=training.backbone, budget_tokens=4 * 32 * 6, processes=2),
        device=DeviceConfig(prompt_tokens=16),
    )  # fmt: skip
    save_sweep(sweep, tmp_path / "sweep.toml")
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            most.append(heads())

    flats = [{**{name: values[0] for name, values in space.items()}, "head_dim": 16, "block_repeat": 1, "num_layers": layers,
              "attention.0": "full", "attention.1": "full"} for layers in (1, 2)]  # fmt: skip
    with shared_cluster(workers, 2), ThreadPoolExecutor(2) as pool:
        watcher = threading.Thread(target=watch)
        watcher.start()
        files = tmp_path / "sweep.toml", Path(training.backbone), Path(training.importance), tmp_path / "scores"
        try:
            with closing(CandidateScorer(*files)) as one, closing(CandidateScorer(*files)) as other:
                scores = list(pool.map(lambda scorer, flat: scorer(flat), (one, other), flats))
        finally:
            over.set()
            watcher.join()
        drivers = {job["DriverPid"] for job in ray._private.state.jobs()}
        quality = diverging(training, replace(workers, workers=2))(model, 4 * 32 * 6, 0)
        assert quality.status == "infeasible" and "nan" in quality.reason, quality.reason
        assert quality.start_loss is None and quality.seconds > 0
        with pytest.raises(InputError, match="processes=3 trainings of 1 workers need 1.5 CPUs at once, the cluster has 1"):
            with shared_cluster(workers, 3):
                pass
        phone = open_device("ray:///model:oneplus_12")
        assert phone.name == "ray:model:oneplus_12" and phone.fidelity == "analytic"
        with pytest.raises(ValueError, match="no node has a resource 'bench', the cluster has none; start that node with"):
            open_device("ray://bench/local")
        measured = phone.measure(MeasureRequest(model=_packed(tmp_path), prompt_tokens=16, decode_tokens=4))
        assert measured["time_to_first_token_ms"] > 0
    assert all(0 < score["loss"] < score["start_loss"] < 6 for score in scores)
    assert scores[0]["loss"] != scores[1]["loss"] and len(drivers) >= 3, "this process, and each scorer's training"
    assert max(most) == 1 and "RAY_ADDRESS" not in os.environ and not ray.is_initialized()


def _packed(folder: Path) -> Path:
    from stages.random_packed import write_pocket

    write_pocket(replace(MODEL, num_kv_heads=2, vocab_size=320), folder / "m.pocket")
    return folder / "m.pocket"
