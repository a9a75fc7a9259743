"""MobileLLM-Flash's search (arXiv 2603.15954): pruned candidates of a wide, shallow backbone under a latency limit."""

from __future__ import annotations

from dataclasses import replace

from launch.config import Recipe
from launch.recipes import RECIPES
from launch.sweep_config import DeviceConfig, GoalConfig, QualityConfig, SweepRecipe


def flash_latency() -> SweepRecipe:
    """Time to the first token under 4 s at 2k tokens, on a phone: 200 trials of 2.6B tokens each, as the paper has it.

    python launch/sweep.py --recipe flash_latency --device ssh://phone --quality.backbone RUN

    The widths' steps are not in the paper; 128 and 512 are ours. The backbone is a run of the largest Flash model's shape,
    which has the paper's 16 layers, width 2048 and 8192; without one its pre-training comes first, which is a cluster's work.
    """
    recipe = _largest_flash()
    model = recipe.model
    return SweepRecipe(
        name="flash_latency", recipe=recipe,
        space={
            "num_layers": [n for n in range(10, 17) if n <= model.num_layers],
            "hidden_size": [n for n in range(1024, 2049, 128) if n <= model.hidden_size],
            "ffn_size": [n for n in range(2048, 8193, 512) if n <= model.ffn_size],
            "num_heads": [model.num_heads], "num_kv_heads": [model.num_kv_heads],
        },
        goal=GoalConfig(ttft_ms=4000.0, loss=3.0),
        quality=QualityConfig(budget_tokens=2_600_000_000, calibration_sequences=4096),
        device=DeviceConfig(prompt_tokens=2048, readings=100, more=50, max_readings=800, max_c=37.0),
        trials=200, batch=8, confirm=8,
    )  # fmt: skip


def _largest_flash() -> Recipe:
    recipes = [make() for name, make in RECIPES.items() if "flash" in name]
    largest = max(recipes, key=lambda recipe: recipe.model.num_params())
    return replace(largest, model=replace(largest.model, attention=()))
