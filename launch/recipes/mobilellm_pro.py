"""MobileLLM-Pro (arXiv 2511.06719): phases 1, 2 and 4 as pretrain, midtrain and qat; instruction tuning between.

Not expressed: the implicit positional distillation of phase 2 and the merging of specialists in phase 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from data_pipeline.config import DataConfig, HeldOutConfig, TokenizerConfig
from launch.config import EvaluationConfig, LaunchConfig, Recipe
from launch.recipes.common import COMMONSENSE, int4_qat
from launch.recipes.mobilellm_r1 import PRETRAIN, TULU
from modeling.families import FAMILIES
from stages.config import CheckpointConfig, DistillConfig, OptimConfig, ParallelConfig, StageConfig, TrainConfig

TEACHER = "teachers/llama-4-scout"
WEIGHTS = {
    "fineweb_edu": 89.75, "starcoder": 4.66, "open_web_math": 1.92, "arxiv": 1.35, "wikipedia": 1.02,
    "stackexchange": 1.02, "algebraic_stack": 0.24,
}  # fmt: skip


def mobilellm_pro_1b() -> Recipe:
    """MobileLLM-Pro 1B: 1.3T tokens distilled from Llama-4-Scout, long context, SFT, INT4 QAT for CPUs.

    python launch/pretrain.py --recipe mobilellm_pro_1b
    """
    sources = tuple(replace(row[0], weight=WEIGHTS[row[0].name]) for row in PRETRAIN if row[0].name in WEIGHTS)
    data = DataConfig(sources=sources)
    sft = StageConfig(
        data=DataConfig(sources=(TULU,), kind="chat"), seq_len=8192, global_batch=64, micro_batch=1, steps=10_000,
        max_positions=131_072, optim=OptimConfig(lr=5e-6, schedule="linear", warmup_steps=300, weight_decay=0.0),
    )  # fmt: skip
    return Recipe(
        name="mobilellm_pro_1b",
        model=FAMILIES["mobilellm_pro_1b"],
        tokenizer=TokenizerConfig(path="tokenizers/llama-4/tokenizer.json", vocab_size=202_048),
        pretrain=StageConfig(
            data=data, seq_len=2048, global_batch=1024, micro_batch=8, steps=640_000,
            optim=OptimConfig(lr=4e-4, schedule="cosine", warmup_steps=10_000), distill=DistillConfig(teacher=TEACHER),
        ),
        midtrain=StageConfig(
            data=data, seq_len=8192, global_batch=24, micro_batch=1, steps=100_000, max_positions=131_072,
            optim=OptimConfig(lr=4e-5, schedule="linear"), distill=DistillConfig(teacher=TEACHER),
        ),
        sft=sft,
        qat=int4_qat(sft, lr=4e-6, steps=100_000),
        train=TrainConfig(
            held_out=(
                HeldOutConfig(name="pretrain", sources=("fineweb_edu",)),
                HeldOutConfig(name="sft", kind="chat", sources=("tulu3",)),
            ),
            eval_every=5000,
        ),
        parallel=ParallelConfig(precision="bf16", compile=True, activation_checkpointing="block"),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        launch=LaunchConfig(runner="ray", workers=8, nodes=1, cpus_per_worker=8, gpus_per_worker=1),
        evaluation=EvaluationConfig(tasks=COMMONSENSE),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {"mobilellm_pro_1b": mobilellm_pro_1b}
