"""Searches by name, as recipes are."""

from __future__ import annotations

from collections.abc import Callable

from launch.sweep_config import SweepRecipe
from launch.sweeps import flash, mixtures, quickstart

SWEEPS: dict[str, Callable[[], SweepRecipe]] = {
    "quickstart_search": quickstart.quickstart_search,
    "smoke_search": quickstart.smoke_search,
    "moe_search": mixtures.moe_search,
    "smoke_moe_search": mixtures.smoke_moe_search,
    "flash_latency": flash.flash_latency,
}
