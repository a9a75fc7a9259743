"""A search on a laptop: a tiny backbone, this machine's own runtime as the device, minutes."""

from __future__ import annotations

from dataclasses import replace

from launch.config import LaunchConfig
from launch.recipes.quickstart import quickstart, smoke
from launch.sweep_config import DeviceConfig, GoalConfig, QualityConfig, SweepRecipe


def quickstart_search() -> SweepRecipe:
    """Forty candidates cut from an 8-layer backbone, measured here, one trained on through the stages, packed and measured.

    python launch/sweep.py --recipe quickstart_search

    Times are processor time, since the same machine trains meanwhile.
    """
    recipe = quickstart()
    assert recipe.pretrain is not None
    held_out = tuple(replace(item, max_documents=min(item.max_documents, 24), max_document_bytes=4_000)
                     for item in recipe.train.held_out)  # fmt: skip
    recipe = replace(
        recipe, name="quickstart_search", model=replace(recipe.model, num_heads=4, num_kv_heads=2, head_dim=32, window=64),
        pretrain=replace(recipe.pretrain, steps=200), train=replace(recipe.train, held_out=held_out),
        launch=LaunchConfig(workers=1, threads_per_worker=1),
        evaluation=replace(recipe.evaluation, limit=40, prompts=recipe.evaluation.prompts[:1]),
    )  # fmt: skip
    return SweepRecipe(
        name="quickstart_search", recipe=recipe,
        space={"num_layers": [3, 4, 5, 6, 7, 8], "hidden_size": [64, 96, 128], "ffn_size": [128, 192, 256, 320, 384],
               "num_heads": [2, 4], "num_kv_heads": [1, 2]},
        goal=GoalConfig(ttft_ms=2.5, loss=6.5),
        quality=QualityConfig(budget_tokens=20_480, calibration_sequences=32, processes=2),
        device=DeviceConfig(prompt_tokens=192, decode_tokens=16, readings=24, more=8, max_readings=60, max_repeats=15,
                            processor_time=True, drift=0.15, cool_s=5.0),
        trials=40, batch=4, confirm=3, retrain=1, retrain_steps={"pretrain": 60, "midtrain": 40, "sft": 40, "qat": 16},
    )  # fmt: skip


def smoke_search() -> SweepRecipe:
    """A few candidates of the smoke recipe's size on a modelled phone: checks the whole path."""
    recipe = smoke()
    recipe = replace(recipe, name="smoke_search", model=replace(recipe.model, num_layers=4, window=32))
    return SweepRecipe(
        name="smoke_search", recipe=recipe,
        space={"num_layers": [2, 3, 4], "hidden_size": [32, 64], "ffn_size": [64, 96, 128], "num_heads": [1, 2],
               "num_kv_heads": [1]},
        goal=GoalConfig(ttft_ms=5.0, loss=7.0),
        quality=QualityConfig(budget_tokens=512, calibration_sequences=8),
        device=DeviceConfig(names=("model:oneplus_12",), prompt_tokens=64, decode_tokens=4, readings=16, more=4,
                            max_readings=20),
        trials=6, batch=2, confirm=2, retrain=1,
    )  # fmt: skip
