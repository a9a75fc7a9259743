"""MobileLLM-R1 (arXiv 2509.24945): the published sources, weights and schedules, with their Hugging Face ids.

Weights are the percentages of the paper's tables; they do not sum to 100 exactly and are normalised. Sources marked
gated ask for an accepted licence; natural_reasoning is CC BY-NC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from data_pipeline.config import DataConfig, HeldOutConfig, SourceConfig, TokenizerConfig
from launch.config import EvaluationConfig, LaunchConfig, Recipe
from launch.recipes.common import COMMONSENSE, hf_source, int4_qat
from modeling.families import FAMILIES
from stages.config import CheckpointConfig, DistillConfig, OptimConfig, ParallelConfig, StageConfig, TrainConfig

_NEMOTRON = "nvidia/Llama-Nemotron-Post-Training-Dataset"
_DOLMINO = "allenai/dolmino-mix-1124"
_NEMOTRON_TEMPLATE = "{input}\n{output}"

# source, phase 1 %, phase 2 %
PRETRAIN = (
    (hf_source("fineweb_edu", "HuggingFaceFW/fineweb-edu", license="ODC-BY"), 63.75, 54.83),
    (hf_source("starcoder", "bigcode/starcoderdata", text_field="content", gated=True), 10.66, 0.52),
    (hf_source("open_web_math", "open-web-math/open-web-math", license="ODC-BY 1.0"), 6.93, 23.33),
    (hf_source("arxiv", "togethercomputer/RedPajama-Data-1T", "arxiv"), 6.36, 1.32),
    (hf_source("wikipedia", _DOLMINO, "wiki", license="ODC-BY"), 5.03, 0.14),
    (hf_source("stackexchange", "togethercomputer/RedPajama-Data-1T", "stackexchange"), 5.03, 0.86),
    (hf_source("algebraic_stack", "EleutherAI/proof-pile-2", "algebraic-stack"), 2.25, 1.26),
    (hf_source("finemath", "HuggingFaceTB/finemath", "finemath-3plus", license="ODC-BY"), 0.0, 8.01),
    (hf_source("natural_reasoning", "facebook/natural_reasoning", license="CC BY-NC 4.0",
         template="{question}\n{reference_answer}"), 0.0, 3.18),
    (hf_source("nemotron_math", _NEMOTRON, "SFT", split="math", template=_NEMOTRON_TEMPLATE, license="CC BY 4.0"), 0.0, 3.01),
    (hf_source("cosmopedia", "HuggingFaceTB/cosmopedia", "web_samples_v2", license="Apache-2.0"), 0.0, 2.70),
    (hf_source("nemotron_code", _NEMOTRON, "SFT", split="code", template=_NEMOTRON_TEMPLATE, license="CC BY 4.0"), 0.0, 0.72),
    (hf_source("pes2o", "allenai/peS2o", "v2", license="ODC-BY"), 0.0, 0.08),
    (hf_source("nemotron_science", _NEMOTRON, "SFT", split="science", template=_NEMOTRON_TEMPLATE,
               license="CC BY 4.0"), 0.0, 0.03),
)  # fmt: skip
MIDTRAIN = (
    (hf_source("dclm", _DOLMINO, "dclm", license="ODC-BY"), 37.03, 6.51),
    (hf_source("flan", _DOLMINO, "flan", license="ODC-BY"), 4.10, 0.72),
    (hf_source("pes2o_mid", _DOLMINO, "pes2o", license="ODC-BY"), 11.41, 2.01),
    (hf_source("wiki_mid", _DOLMINO, "wiki", license="ODC-BY"), 2.66, 0.47),
    (hf_source("stackexchange_mid", _DOLMINO, "stackexchange", license="ODC-BY"), 2.12, 2.00),
    (hf_source("math_mid", _DOLMINO, "math", license="ODC-BY"), 11.63, 29.10),
    (hf_source("nemotron_pretraining_code", "nvidia/Nemotron-Pretraining-Code-v1", gated=True), 20.69, 29.10),
    (hf_source("nemotron_cc_math", "nvidia/Nemotron-CC-Math-v1", "4plus"), 3.45, 19.40),
    (hf_source("starcoder_mid", "bigcode/starcoderdata", text_field="content", gated=True), 6.90, 9.70),
)  # fmt: skip
TULU = hf_source("tulu3", "allenai/tulu-3-sft-olmo-2-mixture-0225", license="ODC-BY over subsets")


def mixture(table: tuple[tuple[SourceConfig, float, float], ...], phase: int) -> tuple[SourceConfig, ...]:
    """The sources of phase 1 or 2 with their published weights."""
    shares = [(source, (first, second)[phase - 1]) for source, first, second in table]
    return tuple(replace(source, weight=share) for source, share in shares if share > 0)


def mobilellm_r1(name: str, phase: int) -> Recipe:
    """MobileLLM-R1, one phase of pre- and mid-training (2T and 100B tokens), SFT on Tulu 3, INT4 QAT.

    The paper's two phases are two recipes: run the stages of the first, then those of `..._phase2` with --init-from.

    python launch/pretrain.py --recipe mobilellm_r1_140m
    """
    model = FAMILIES[name]
    sft = StageConfig(
        data=DataConfig(sources=(TULU,), kind="chat"), seq_len=4096, global_batch=512, micro_batch=4, steps=3_400,
        max_positions=4096, optim=OptimConfig(lr=5e-6, schedule="linear", warmup_steps=100, weight_decay=0.0),
    )  # fmt: skip
    return Recipe(
        name=name if phase == 1 else f"{name}_phase2",
        # Trained at the base RoPE; the published 8,000,000 comes with the 32k stage (theta x 8).
        model=replace(model, rope_theta=1_000_000.0, max_positions=2048),
        tokenizer=TokenizerConfig(path="tokenizers/llama-3/tokenizer.json", vocab_size=model.vocab_size),
        pretrain=StageConfig(
            data=DataConfig(sources=mixture(PRETRAIN, phase), packing="concat"), seq_len=2048, global_batch=2048,
            micro_batch=16, steps=500_000,
            optim=OptimConfig(lr=4e-3, schedule="linear", warmup_steps=2000, min_lr_ratio=0.1),
        ),
        midtrain=StageConfig(
            data=DataConfig(sources=mixture(MIDTRAIN, phase)), seq_len=4096, global_batch=512, micro_batch=4,
            steps=50_000, max_positions=4096, optim=OptimConfig(lr=3.6e-4, schedule="linear"),
            distill=DistillConfig(teacher="teachers/llama-3.1-8b-instruct"),
        ),
        sft=sft,
        qat=int4_qat(sft, lr=4e-6, steps=2_000),
        train=TrainConfig(
            held_out=(
                HeldOutConfig(name="pretrain", sources=("fineweb_edu", "open_web_math")),
                HeldOutConfig(name="midtrain", sources=("math_mid",)),
                HeldOutConfig(name="sft", kind="chat", sources=("tulu3",)),
            ),
            eval_every=5000,
        ),
        parallel=ParallelConfig(precision="bf16", compile=True),
        checkpoint=CheckpointConfig(every=1000, keep=3),
        launch=LaunchConfig(runner="ray", workers=128, nodes=16, cpus_per_worker=8, gpus_per_worker=1),
        evaluation=EvaluationConfig(tasks=COMMONSENSE),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Recipe]] = {}
for _name in ("mobilellm_r1_140m", "mobilellm_r1_360m", "mobilellm_r1_950m"):
    for _phase in (1, 2):
        _make = partial(mobilellm_r1, _name, _phase)
        _make.__doc__ = mobilellm_r1.__doc__
        RECIPES[_name if _phase == 1 else f"{_name}_phase2"] = _make
