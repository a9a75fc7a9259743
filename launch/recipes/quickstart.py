"""All four stages on a laptop, on real text, in minutes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig, TokenizerConfig
from launch.config import EvaluationConfig, LaunchConfig, Recipe
from modeling.config import ModelConfig
from quant.spec import QuantSpec
from stages.config import DistillConfig, OptimConfig, ParallelConfig, StageConfig, TrainConfig

MODEL = ModelConfig(
    vocab_size=2048, hidden_size=128, num_layers=8, num_heads=2, num_kv_heads=1, ffn_size=384, max_positions=256,
    init_std=0.06,
)  # fmt: skip
"""Deep and thin like MobileLLM-125M. The larger init suits the narrow width: at 0.02 the loss stays at its unigram
level for 200 steps (docs/log.md)."""


def quickstart() -> Recipe:
    """Four stages of a 1.8M-parameter MobileLLM on real text: minutes on two cores, on two Ray workers with FSDP.

    python launch/recipe.py --recipe quickstart

    With POCKETFORGE_DATA naming a folder of sets (books, textbooks, maths, instructions) it reads those, else the
    text that comes with Python. The report of a run shows what each stage gained.
    """
    folder = os.environ.get("POCKETFORGE_DATA")
    pretrain, midtrain, sft = _shared_sets() if folder and Path(folder).is_dir() else _embedded_sets()
    long: dict[str, Any] = dict(rope_theta=20_000.0, max_positions=512)
    return Recipe(
        name="quickstart",
        model=MODEL,
        tokenizer=TokenizerConfig(vocab_size=MODEL.vocab_size, train_bytes=3_000_000),
        pretrain=StageConfig(
            data=DataConfig(sources=pretrain), seq_len=256, global_batch=8, steps=420,
            optim=OptimConfig(lr=4e-3, schedule="cosine", warmup_steps=20, min_lr_ratio=0.1),
        ),
        midtrain=StageConfig(
            data=DataConfig(sources=midtrain), seq_len=512, global_batch=4, steps=170, **long,
            optim=OptimConfig(lr=2e-3, schedule="linear", warmup_steps=5),
        ),
        sft=StageConfig(
            data=DataConfig(sources=sft, kind="chat"), seq_len=512, global_batch=8, steps=90, **long,
            optim=OptimConfig(lr=1e-3, schedule="linear", warmup_steps=5, weight_decay=0.0),
        ),
        qat=StageConfig(
            data=DataConfig(sources=sft, kind="chat"), seq_len=512, global_batch=8, steps=36, **long,
            optim=OptimConfig(lr=2e-4, schedule="cosine", warmup_steps=3, weight_decay=0.0),
            distill=DistillConfig(teacher="init"), quant=QuantSpec(),
        ),
        train=TrainConfig(
            log_every=5,
            held_out=(
                HeldOutConfig(name="pretrain", sources=_names(pretrain), max_documents=10, max_document_bytes=8_000),
                HeldOutConfig(name="midtrain", sources=_names(midtrain)[:2], max_documents=16, max_document_bytes=8_000),
                HeldOutConfig(name="sft", kind="chat", sources=_names(sft), max_documents=96),
            ),
        ),
        parallel=ParallelConfig(precision="fp32", reshard_after_forward=False),
        launch=LaunchConfig(workers=2),
        evaluation=EvaluationConfig(
            tasks=("arc_easy", "piqa"), limit=100,
            prompts=("The history of", "To solve the equation", "user: What is the sum of two and three?"),
        ),
    )  # fmt: skip


def smoke() -> Recipe:
    """The quickstart with a few steps a stage and one process: checks the whole path in under a minute."""
    recipe = quickstart()
    tiny = replace(recipe.model, num_layers=2, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=128,
                   vocab_size=512)
    small: dict[str, Any] = dict(steps=4, seq_len=64, global_batch=4)
    stages: dict[str, Any] = {
        name: replace(stage, data=_cut(stage.data, 200_000), **small) for name, stage in recipe.stages().items()
    }
    return replace(
        recipe,
        name="smoke",
        model=tiny,
        tokenizer=TokenizerConfig(vocab_size=512, train_bytes=200_000),
        **stages,
        train=replace(recipe.train, log_every=1,
                      held_out=tuple(replace(item, max_documents=4, max_document_bytes=1_000)
                                     for item in recipe.train.held_out)),
        launch=LaunchConfig(workers=1),
        evaluation=replace(recipe.evaluation, tasks=(), max_new_tokens=8),
    )


def _cut(data: DataConfig, max_bytes: int) -> DataConfig:
    return replace(data, held_out_fraction=0.1,
                   sources=tuple(replace(source, max_bytes=max_bytes) for source in data.sources))


Sources = tuple[SourceConfig, ...]


def _names(sources: Sources) -> tuple[str, ...]:
    return tuple(source.name for source in sources)


def _shared_sets() -> tuple[Sources, Sources, Sources]:
    """Books and textbooks, then maths and code, then conversations: the sets of POCKETFORGE_DATA."""
    root = "$POCKETFORGE_DATA"
    pretrain = (
        SourceConfig(name="textbooks", path=f"{root}/pretrain/openstax_textbooks.jsonl.gz", weight=0.6, max_bytes=6_000_000),
        SourceConfig(name="books", path=f"{root}/pretrain/standard_ebooks.jsonl.gz", weight=0.4, max_bytes=4_000_000),
    )
    midtrain = (
        SourceConfig(name="maths", path=f"{root}/midtrain/openstax_math_physics.jsonl.gz", weight=0.6, max_bytes=4_000_000),
        SourceConfig(name="word_problems", path=f"{root}/midtrain/gsm8k_train.jsonl.gz", weight=0.25,
                     template="{question}\n{solution}"),
        SourceConfig(name="textbooks", path=f"{root}/pretrain/openstax_textbooks.jsonl.gz", weight=0.15, max_bytes=6_000_000),
    )
    sft = (
        SourceConfig(name="instructions", path=f"{root}/sft/single_turn.jsonl.gz", weight=0.7, max_bytes=3_000_000),
        SourceConfig(name="dialogues", path=f"{root}/sft/multi_turn.jsonl.gz", weight=0.3, max_bytes=2_000_000),
    )
    return pretrain, midtrain, sft


def _embedded_sets() -> tuple[Sources, Sources, Sources]:
    """Python's own library: its source, then its documentation strings, then questions about its functions."""
    pretrain = (SourceConfig(name="library", format="python_docs", subset="code", max_bytes=8_000_000),)
    midtrain = (
        SourceConfig(name="docstrings", format="python_docs", subset="prose", weight=0.8, max_bytes=4_000_000),
        SourceConfig(name="library", format="python_docs", subset="code", weight=0.2, max_bytes=8_000_000),
    )
    sft = (SourceConfig(name="questions", format="python_qa", max_bytes=3_000_000),)
    return pretrain, midtrain, sft
