"""A guard cut out of a chat model: fewer blocks, a narrower FFN, a head that says only what its answers need, INT4.

The compression of Llama Guard 3-1B-INT4 (arXiv 2411.17713): blocks of least influence and FFN channels go, the output layer is
trimmed to the tokens of its answers, the parent teaches while training goes on, quantization-aware training ends it. The shapes
and lengths here are ours. `launch/prune.py` makes the start:

    python launch/prune.py --from runs/quickstart/sft --recipe guard_quickstart --output-tokens 256 --distill 0.7 \
        --output runs/guard-start
    python launch/recipe.py --recipe runs/guard-start/recipe.toml --init-from runs/guard-start --output-dir runs/guard
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from data_pipeline.config import HeldOutConfig
from launch.config import Recipe
from launch.recipes.mobilellm_flash import mobilellm_flash
from launch.recipes.quickstart import quickstart


def guard_quickstart() -> Recipe:
    """6 of the quickstart's 8 blocks and 256 of its 384 FFN channels; SFT taught by the parent, then INT4 QAT.

    python launch/prune.py --from runs/quickstart/sft --recipe guard_quickstart --output-tokens 256 --distill 0.7 --output DIR
    """
    base = quickstart()
    assert base.sft is not None
    chats = tuple(source.name for source in base.sft.data.sources)
    held_out = (HeldOutConfig(name="sft", kind="chat", sources=chats, max_documents=96),)
    return replace(
        base, name="guard_quickstart", model=replace(base.model, num_layers=6, ffn_size=256), pretrain=None, midtrain=None,
        train=replace(base.train, held_out=held_out),
    )  # fmt: skip


def guard_1b() -> Recipe:
    """12 of 16 blocks and 6400 of 8192 FFN channels of a 1.4B chat model; SFT taught by the parent, then INT4 QAT.

    python launch/prune.py --from PARENT/sft --recipe guard_1b --output-tokens 32 --distill 0.7 --output DIR
    """
    base = mobilellm_flash("mobilellm_flash_1_4b")
    names = {source.name for stage in (base.sft, base.qat) if stage for source in stage.data.sources}
    held_out = tuple(item for item in base.train.held_out if set(item.sources) <= names)
    return replace(
        base, name="guard_1b", model=replace(base.model, num_layers=12, ffn_size=6400, attention=()), pretrain=None,
        train=replace(base.train, held_out=held_out),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {"guard_quickstart": guard_quickstart, "guard_1b": guard_1b}
