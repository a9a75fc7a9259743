"""MobileLLM and its layer-shared form (arXiv 2402.14905): the paper's pre-training, with the later papers' stages.

The paper pre-trains only: 480k steps of 1024 sequences of 2048 tokens, Adam 0.9/0.95, weight decay 0.1, cosine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig, TokenizerConfig
from launch.config import EvaluationConfig, LaunchConfig, Recipe
from launch.recipes.common import COMMONSENSE, int4_qat
from modeling.families import FAMILIES
from stages.config import CheckpointConfig, OptimConfig, ParallelConfig, StageConfig, TrainConfig

WEB = SourceConfig(name="fineweb_edu", path="HuggingFaceFW/fineweb-edu", format="hf", license="ODC-BY")
INSTRUCTIONS = SourceConfig(
    name="tulu3", path="allenai/tulu-3-sft-olmo-2-mixture-0225", format="hf", license="ODC-BY over subsets",
)  # fmt: skip


def mobilellm(name: str) -> Recipe:
    """MobileLLM pre-training on FineWeb-Edu (1T tokens, 32 GPUs), SFT on Tulu 3, INT4 QAT.

    python launch/pretrain.py --recipe mobilellm_125m
    """
    sft = StageConfig(
        data=DataConfig(sources=(INSTRUCTIONS,), kind="chat"), seq_len=2048, global_batch=128, micro_batch=4, steps=13_500,
        optim=OptimConfig(lr=5e-6, schedule="linear", warmup_steps=400, weight_decay=0.0),
    )  # fmt: skip
    return Recipe(
        name=name,
        model=FAMILIES[name],
        tokenizer=TokenizerConfig(vocab_size=32_000, train_bytes=200_000_000),
        pretrain=StageConfig(
            data=DataConfig(sources=(WEB,)), seq_len=2048, global_batch=1024, micro_batch=32, steps=480_000,
            optim=OptimConfig(lr=2e-3, schedule="cosine", warmup_steps=1000),
        ),
        sft=sft,
        qat=int4_qat(sft, lr=4e-6, steps=5_000),
        train=TrainConfig(
            held_out=(
                HeldOutConfig(name="pretrain", sources=("fineweb_edu",)),
                HeldOutConfig(name="sft", kind="chat", sources=("tulu3",)),
            ),
            eval_every=5000,
        ),
        parallel=ParallelConfig(precision="bf16", compile=True),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        launch=LaunchConfig(runner="ray", workers=32, cpus_per_worker=8, gpus_per_worker=1),
        evaluation=EvaluationConfig(tasks=COMMONSENSE),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {}
for _name in FAMILIES:
    if _name.startswith("mobilellm_") and _name.split("_")[1] not in {"r1", "pro", "flash"}:
        RECIPES[_name] = partial(mobilellm, _name)
        RECIPES[_name].__doc__ = mobilellm.__doc__
