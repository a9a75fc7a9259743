"""A tiny trained backbone and the scorer that prunes it: what tests of quality start from."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.config import HeldOutConfig, TokenizerConfig
from launch.config import LaunchConfig, Recipe, TrackingConfig
from launch.search_quality import PrunedTraining
from stages.config import OptimConfig, StageConfig, TrainConfig
from stages.importance_file import Calibration, calibrate_checkpoint
from tests.helpers.stage_jobs import MODEL, pretrain_job, run_job, text_data


def train_backbone(folder: Path) -> Path:
    run_job(pretrain_job(folder, steps=30, lr=1e-2))
    return folder


def pruned_training(backbone: Path, folder: Path) -> PrunedTraining:
    data = text_data(backbone)
    stage = StageConfig(data=data, optim=OptimConfig(lr=3e-3, warmup_steps=4), steps=99, seq_len=32, global_batch=4)
    recipe = Recipe(
        name="tiny", model=MODEL, tokenizer=TokenizerConfig(vocab_size=300, train_bytes=20_000), pretrain=stage,
        train=TrainConfig(held_out=(HeldOutConfig(name="texts", sources=("texts",), max_documents=4),)),
        launch=LaunchConfig(threads_per_worker=1), tracking=TrackingConfig(wandb="disabled"),
    )  # fmt: skip
    importance = calibrate_checkpoint(backbone / "run", data, Calibration(sequences=4, seq_len=32), backbone / "cache")
    return PrunedTraining(recipe=recipe, backbone=str(backbone / "run"), importance=str(importance), folder=str(folder))
