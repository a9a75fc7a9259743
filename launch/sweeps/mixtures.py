"""Searches over mixtures of experts and dense models together: capacity, granularity and a shared expert are dimensions."""

from __future__ import annotations

from dataclasses import replace

from launch.config import LaunchConfig
from launch.recipes.mobilemoe import SHORT, tiny_moe
from launch.recipes.quickstart import smoke
from launch.sweep_config import DeviceConfig, GoalConfig, QualityConfig, SweepRecipe
from modeling.moe_config import MoEConfig


def moe_search() -> SweepRecipe:
    """Thirty models of the tiny MobileMoE's kind, each trained from random weights, measured by this machine's own runtime.

    python launch/sweep.py --recipe moe_search

    A dense model and a mixture of the same FFN cost as many products; what the others cost, router, sorting and small groups of
    tokens, is measured. Times are processor time, of a machine that may have other work.
    """
    recipe = tiny_moe()
    held_out = tuple(replace(item, max_documents=min(item.max_documents, 24), max_document_bytes=4_000)
                     for item in recipe.train.held_out)  # fmt: skip
    recipe = replace(
        recipe, name="moe_search", model=replace(recipe.model, window=64), train=replace(recipe.train, held_out=held_out),
        launch=LaunchConfig(workers=1, threads_per_worker=1),
        evaluation=replace(recipe.evaluation, limit=40, prompts=recipe.evaluation.prompts[:1]),
    )  # fmt: skip
    return SweepRecipe(
        name="moe_search", recipe=recipe,
        space={"num_layers": [3, 4, 6, 8], "hidden_size": [64, 96, 128], "ffn_size": [128, 256, 384], "num_heads": [2],
               "num_kv_heads": [1], "experts": [1, 2, 4, 8], "granularity": [1, 2, 4], "shared_experts": [0, 1, 2],
               "attention": ["full", "window"]},
        goal=GoalConfig(ttft_ms=3.5, loss=7.0),
        quality=QualityConfig(source="scratch", budget_tokens=102_400, processes=2),
        device=DeviceConfig(prompt_tokens=192, decode_tokens=16, readings=40, more=10, max_readings=100, min_repeats=20,
                            max_repeats=80, warmup=10, processor_time=True, drift=0.2, cool_s=5.0),
        trials=30, batch=4, confirm=3,
    )  # fmt: skip


def smoke_moe_search() -> SweepRecipe:
    """A few dense and mixed candidates of the smoke recipe's size on a modelled phone: checks the whole path."""
    recipe = smoke()
    moe = MoEConfig(num_experts=7, top_k=1, expert_size=64, shared_size=64, route_scale=2.5)
    assert recipe.pretrain is not None
    recipe = replace(recipe, name="smoke_moe_search", model=replace(recipe.model, num_layers=3, window=32, moe=moe),
                     pretrain=replace(recipe.pretrain, moe=SHORT))  # fmt: skip
    return SweepRecipe(
        name="smoke_moe_search", recipe=recipe,
        space={"num_layers": [2, 3], "hidden_size": [32, 64], "ffn_size": [64, 128], "num_heads": [1, 2], "num_kv_heads": [1],
               "experts": [1, 4], "granularity": [1, 2], "shared_experts": [0, 1]},
        goal=GoalConfig(ttft_ms=5.0, loss=7.0),
        quality=QualityConfig(source="scratch", budget_tokens=512),
        device=DeviceConfig(names=("model:oneplus_12",), prompt_tokens=64, decode_tokens=4, readings=16, more=4,
                            max_readings=20),
        trials=6, batch=2, confirm=2, retrain=1,
    )  # fmt: skip
