"""Recipes by name: functions that return the whole `Recipe`. Diffs of runs are diffs of code."""

from __future__ import annotations

from collections.abc import Callable

from launch.config import Recipe
from launch.recipes import (
    guard,
    mobilellm,
    mobilellm_flash,
    mobilellm_pro,
    mobilellm_r1,
    mobilemoe,
    quickstart,
    scaling,
)

RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart.quickstart,
    "smoke": quickstart.smoke,
    **mobilellm.RECIPES,
    **mobilellm_r1.RECIPES,
    **mobilellm_pro.RECIPES,
    **mobilellm_flash.RECIPES,
    **mobilemoe.RECIPES,
    **guard.RECIPES,
    **scaling.RECIPES,
}
