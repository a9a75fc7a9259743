"""MobileMoE (arXiv 2605.27358): the four published stages of S, M and L, and a tiny sister for a laptop.

Published: shapes, tokens and sequence length of every stage, peak rates and schedules, the shares of the data's kinds,
dispatch (capacity 1.5, then dropless), expert parallelism 4, the balance bias's rate, the z-loss's weight, the quantizer.
Ours, because we could not read them anywhere: batch sizes, warm-up, AdamW's betas and weight decay, the rest of the
mid-training mixture, the data of QAT, which set stands for which kind, distillation in QAT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig, TokenizerConfig
from launch.config import EvaluationConfig, LaunchConfig, Recipe
from launch.recipes.common import COMMONSENSE, hf_source, int4_qat
from launch.recipes.quickstart import quickstart
from modeling.families import FAMILIES
from modeling.moe_config import MoEConfig
from quant.spec import QuantSpec
from stages.config import CheckpointConfig, MoETrainConfig, OptimConfig, ParallelConfig, StageConfig, TrainConfig

_NEMOTRON = "nvidia/Llama-Nemotron-Post-Training-Dataset"
_WEB = hf_source("fineweb_edu", "HuggingFaceFW/fineweb-edu", license="ODC-BY")
_DOLMA = hf_source("dclm", "allenai/dolmino-mix-1124", "dclm", license="ODC-BY")
_MATH = hf_source("finemath", "HuggingFaceTB/finemath", "finemath-3plus", license="ODC-BY")
_CODE = hf_source("starcoder", "bigcode/starcoderdata", text_field="content", gated=True)
_KNOWLEDGE = hf_source("wikipedia", "allenai/dolmino-mix-1124", "wiki", license="ODC-BY")
_SCIENCE = hf_source("pes2o", "allenai/dolmino-mix-1124", "pes2o", license="ODC-BY")
_REASONING = hf_source("natural_reasoning", "facebook/natural_reasoning", license="CC BY-NC 4.0",
                       template="{question}\n{reference_answer}")  # fmt: skip
_CHAT = hf_source("tulu3", "allenai/tulu-3-sft-olmo-2-mixture-0225", license="ODC-BY over subsets")
_CHAT_MATH = hf_source("nemotron_math", _NEMOTRON, "SFT", split="math", license="CC BY 4.0")
_CHAT_CODE = hf_source("nemotron_code", _NEMOTRON, "SFT", split="code", license="CC BY 4.0")

DROPPING = MoETrainConfig(dispatch="capacity", capacity_factor=1.5)
DROPLESS = MoETrainConfig(dispatch="dropless")
SHORT = MoETrainConfig(dispatch="dropless", bias_rate=0.02)
"""A bias that moves 1e-3 a step cannot catch up with the router within hundreds of steps: at the quickstart's learning rate
experts die meanwhile (docs/log.md)."""


def _mix(*shares: tuple[SourceConfig, float]) -> tuple[SourceConfig, ...]:
    return tuple(replace(source, weight=share) for source, share in shares)


PRETRAIN = _mix((_WEB, 31.0), (_DOLMA, 31.0), (_MATH, 11.6), (_CODE, 10.0), (_KNOWLEDGE, 10.0), (_SCIENCE, 6.4))
"""Web 62 %, in halves that are ours."""
MIDTRAIN = _mix((_KNOWLEDGE, 32.0), (_CODE, 22.0), (_MATH, 21.0), (_WEB, 9.0), (_SCIENCE, 8.0), (_REASONING, 8.0))
"""Knowledge, code, maths and web as published; the last two fill up the rest."""
SFT = _mix((_CHAT_MATH, 30.4), (_CHAT, 47.5), (_CHAT_CODE, 22.1))
"""Maths and code as published; one mixture stands for chat, safety, science, tools and reasoning."""


def mobilemoe(name: str) -> Recipe:
    """MobileMoE: 6T tokens of pre-training, 500B of mid-training, 126B of SFT, 21B of INT4 QAT.

    python launch/pretrain.py --recipe mobilemoe_s
    """
    model = FAMILIES[name]
    sft = StageConfig(
        data=DataConfig(sources=SFT, kind="chat"), seq_len=8192, global_batch=512, micro_batch=1, steps=30_000,
        optim=OptimConfig(lr=4e-6, schedule="cosine", warmup_steps=300, weight_decay=0.0), moe=DROPLESS,
    )  # fmt: skip
    return Recipe(
        name=name,
        model=model,
        tokenizer=TokenizerConfig(path="tokenizers/llama-3/tokenizer.json", vocab_size=model.vocab_size),
        pretrain=StageConfig(
            data=DataConfig(sources=PRETRAIN, packing="concat"), seq_len=2048, global_batch=2048, micro_batch=8,
            steps=1_430_000, optim=OptimConfig(lr=4e-4, schedule="cosine", warmup_steps=2000, min_lr_ratio=0.1),
            moe=DROPPING,
        ),
        midtrain=StageConfig(
            data=DataConfig(sources=MIDTRAIN), seq_len=8192, global_batch=512, micro_batch=1, steps=119_000,
            optim=OptimConfig(lr=4e-5, schedule="linear"), moe=DROPPING,
        ),
        sft=sft,
        qat=replace(int4_qat(sft, lr=4e-6, steps=5_000), quant=QuantSpec(expert_axis="output")),
        train=TrainConfig(
            held_out=(
                HeldOutConfig(name="pretrain", sources=("fineweb_edu", "finemath")),
                HeldOutConfig(name="midtrain", sources=("wikipedia",)),
                HeldOutConfig(name="sft", kind="chat", sources=("tulu3",)),
            ),
            eval_every=5000,
        ),
        parallel=ParallelConfig(precision="bf16", expert=4, activation_checkpointing="block"),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        launch=LaunchConfig(runner="ray", workers=256, nodes=32, cpus_per_worker=8, gpus_per_worker=1),
        evaluation=EvaluationConfig(tasks=COMMONSENSE),
    )  # fmt: skip


def tiny_moe() -> Recipe:
    """Four stages of a tiny MobileMoE on real text: the quickstart's with its feed-forwards turned into experts.

    python launch/recipe.py --recipe tiny_moe

    As many parameters take part in a token as in the quickstart's dense model: 32 experts of a quarter of its feed-forward,
    two of which are merged into one that every token uses, and two of the other thirty.
    """
    base = quickstart()
    width = base.model.ffn_size // 4
    moe = MoEConfig(num_experts=30, top_k=2, expert_size=width, shared_size=2 * width, route_scale=2.5)
    stages: dict[str, Any] = {name: replace(stage, moe=SHORT) for name, stage in base.stages().items()}
    return replace(base, name="tiny_moe", model=replace(base.model, moe=moe, qk_norm=True), **stages)


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny_moe": tiny_moe}
for _name in ("mobilemoe_s", "mobilemoe_m", "mobilemoe_l"):
    _make = partial(mobilemoe, _name)
    _make.__doc__ = mobilemoe.__doc__
    RECIPES[_name] = _make
