"""MobileLLM-Flash (arXiv 2603.15954): the three shapes found, with the paper's continued training and tuning lengths.

The paper prunes them from an 1.8B backbone and continues for 500B tokens: cut the shape out of a trained backbone with
`launch/prune.py` and start with --init-from, else they start from random weights.
Learning rates are MobileLLM-Pro's (the paper's were not found).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from launch.config import Recipe
from launch.recipes.mobilellm_pro import mobilellm_pro_1b
from modeling.families import FAMILIES
from stages.config import StageConfig


def mobilellm_flash(name: str) -> Recipe:
    """MobileLLM-Flash shape (skipped attention): 500B tokens at 2048, SFT at 8192, INT4 QAT.

    python launch/pretrain.py --recipe mobilellm_flash_350m
    """
    base = mobilellm_pro_1b()
    assert base.pretrain and base.sft and base.qat

    def at_8k(stage: StageConfig) -> StageConfig:
        return replace(stage, seq_len=8192, max_positions=8192)

    return replace(
        base, name=name, model=FAMILIES[name], pretrain=replace(base.pretrain, steps=240_000), midtrain=None,
        sft=at_8k(base.sft), qat=at_8k(base.qat),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {}
for _name in ("mobilellm_flash_350m", "mobilellm_flash_650m", "mobilellm_flash_1_4b"):
    RECIPES[_name] = partial(mobilellm_flash, _name)
    RECIPES[_name].__doc__ = mobilellm_flash.__doc__
