"""Scoring a candidate on Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.config import LaunchConfig
from stages.config import OptimConfig
from tests.helpers.pruned_training import pruned_training, train_backbone
from tests.helpers.stage_jobs import MODEL


@pytest.mark.ray
@pytest.mark.slow
def test_on_ray_two_workers_share_a_candidate_and_divergence_comes_back_as_such(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    training = pruned_training(train_backbone(tmp_path), tmp_path / "trials")
    workers = LaunchConfig(workers=2, cpus_per_worker=0.5, threads_per_worker=1)
    assert training.recipe.pretrain is not None
    wild = replace(training.recipe.pretrain, optim=OptimConfig(lr=1e30))
    quality = replace(training, recipe=replace(training.recipe, launch=workers, pretrain=wild))(MODEL, 4 * 32 * 6, 0)
    assert quality.status == "infeasible" and "nan" in quality.reason, quality.reason
    assert quality.start_loss is None and quality.seconds > 0
