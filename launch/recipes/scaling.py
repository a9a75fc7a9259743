"""What the rungs of a ladder for the scaling law share (docs/scaling-law.md)."""

from __future__ import annotations

from dataclasses import replace

from data_pipeline.config import TokenizerConfig
from launch.config import EvaluationConfig, LaunchConfig, Recipe
from launch.recipes.quickstart import quickstart
from stages.config import OptimConfig, TrainConfig

VOCABULARY = 1024


def scaling_ladder() -> Recipe:
    """Pre-training of the quickstart's text in small batches, for `launch/scaling_law.py ladder`; a small vocabulary.

    Many steps for few tokens, so that a rung of 100,000 tokens has learnt something, and a vocabulary whose embedding is not
    most of a tiny model. Its width is the one that the learning rate suits.
    """
    recipe = quickstart()
    stage = recipe.pretrain
    assert stage is not None
    held_out = replace(recipe.train.held_out[0], max_documents=10, max_document_bytes=4_000)
    return replace(
        recipe, name="scaling_ladder",
        model=replace(recipe.model, vocab_size=VOCABULARY, num_layers=4, ffn_size=512, max_positions=128),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, train_bytes=1_000_000),
        pretrain=replace(stage, seq_len=128, global_batch=8, steps=400,
                         optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=20, min_lr_ratio=0.1)),
        midtrain=None, sft=None, qat=None, train=TrainConfig(log_every=10, held_out=(held_out,)),
        launch=LaunchConfig(threads_per_worker=1), evaluation=EvaluationConfig(),
    )  # fmt: skip


RECIPES = {"scaling_ladder": scaling_ladder}
