"""What `prune_ranking.py` trains: the tiny recipe, the candidates, the backbone, and the trials' functions."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from launch.config import LaunchConfig, Recipe, TrackingConfig
from launch.recipes.quickstart import quickstart
from launch.rundir import write_json
from launch.runner import train_stages
from launch.search_quality import PrunedTraining
from modeling.config import AttentionKind, ModelConfig
from stages.config import OptimConfig, TrainConfig
from stages.importance_file import Calibration, calibrate_checkpoint

BACKBONE = ModelConfig(
    vocab_size=512, hidden_size=64, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=192,
    max_positions=128, init_std=0.08,
)  # fmt: skip
"""Small, so that training from scratch can afford to get past its first plateau: before that, losses tell how soon a shape
leaves it (shallow ones first), not what it can learn. At 1.2M parameters 200k tokens were too few (docs/pruning.md)."""
BATCH, LENGTH = 8, 128
STEP_TOKENS = BATCH * LENGTH


@dataclass(frozen=True)
class ShortRecipe:
    """How a pruned candidate is trained before it is scored."""

    rate: float
    """Peak learning rate as a share of that of training from scratch."""
    longer: float = 1.0
    """Times as many steps."""
    distill: float = 0.0
    """Weight of the backbone's KL term."""

    def steps(self, base: int) -> int:
        return max(1, round(base * self.longer))


SHORT = {
    "rate 1": ShortRecipe(1.0),
    "rate 1/2": ShortRecipe(0.5),
    "rate 1, taught by the backbone": ShortRecipe(1.0, distill=0.5),
    "rate 1, twice as long": ShortRecipe(1.0, longer=2.0),
}
"""By name; the first is what `launch/sweep.py` does: the rate of its recipe's stage, no teacher."""


@dataclass(frozen=True)
class Setup:
    """A backbone that is trained, its importance, and where everything lies."""

    recipe: Recipe
    folder: Path
    importance: str

    def short(self, recipe: ShortRecipe, **changes: object) -> PrunedTraining:
        """Inherit and train on as `recipe` says; `changes` are fields of `PrunedTraining`."""
        stage = self.recipe.pretrain
        assert stage is not None
        stage = replace(stage, optim=replace(stage.optim, lr=stage.optim.lr * recipe.rate))
        training = PrunedTraining(recipe=replace(self.recipe, pretrain=stage), backbone=str(self.folder / "backbone"),
                                  importance=self.importance, folder=str(self.folder / "trials"),
                                  distill_weight=recipe.distill)  # fmt: skip
        return replace(training, **changes)  # type: ignore[arg-type]

    def scratch(self) -> PrunedTraining:
        return PrunedTraining(recipe=self.recipe, backbone="", folder=str(self.folder / "trials"))


def tiny_recipe(threads: int) -> Recipe:
    """The quickstart's text and tokenizer at a smaller vocabulary; one process."""
    base = quickstart()
    assert base.pretrain is not None
    stage = replace(
        base.pretrain, seq_len=LENGTH, global_batch=BATCH, steps=1,
        data=replace(base.pretrain.data, held_out_fraction=0.05),
        optim=OptimConfig(lr=1e-2, schedule="cosine", warmup_steps=50, min_lr_ratio=0.1),
    )  # fmt: skip
    held_out = tuple(replace(item, max_documents=24, max_document_bytes=4_000) for item in base.train.held_out
                     if item.name == "pretrain")  # fmt: skip
    return Recipe(
        name="prune-ranking", model=BACKBONE, tokenizer=replace(base.tokenizer, vocab_size=BACKBONE.vocab_size), pretrain=stage,
        train=TrainConfig(log_every=50, held_out=held_out), tracking=TrackingConfig(wandb="disabled"),
        launch=LaunchConfig(runner="local", threads_per_worker=threads),
    )  # fmt: skip


def prepare(folder: Path, steps: int, threads: int) -> Setup:
    """Train the backbone where `folder` has none yet, and calibrate it."""
    recipe = tiny_recipe(threads)
    assert recipe.pretrain is not None
    long = replace(recipe, pretrain=replace(recipe.pretrain, steps=steps))
    train_stages(long, folder / "backbone", ["pretrain"], init_from=None, cache_dir=folder / "trials" / "data")
    options = Calibration(sequences=128, seq_len=LENGTH, micro_batch=32, drop_batches=2)
    importance = calibrate_checkpoint(folder / "backbone", recipe.pretrain.data, options, folder / "trials" / "data")
    write_json(folder / "setup.json", {"backbone_steps": steps, "importance": importance.name})
    return Setup(recipe, folder, str(importance))


def draw_candidates(count: int, seed: int) -> list[ModelConfig]:
    """Different shapes within the backbone: depth, widths, heads, and blocks without attention (never three in a row)."""
    draw, found = random.Random(seed), dict[ModelConfig, None]()
    while len(found) < count:
        layers = draw.randint(2, BACKBONE.num_layers)
        kinds: tuple[AttentionKind, ...] = tuple("skip" if draw.random() < 0.25 else "full" for _ in range(layers))
        if "full" not in kinds or "skipskipskip" in "".join(kinds):
            continue
        kv_heads = draw.choice((1, 2))
        found[replace(
            BACKBONE, num_layers=layers, hidden_size=draw.choice((32, 40, 48, 56, 64)), num_kv_heads=kv_heads,
            ffn_size=draw.choice((64, 96, 128, 160, 192)), num_heads=draw.choice((2, 4)), attention=kinds,
        )] = None  # fmt: skip
    return list(found)
