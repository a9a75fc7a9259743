"""Tiny stages on made-up text: jobs that train in a second, for tests of the loop and of what surrounds it."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from modeling.config import ModelConfig
from quant.spec import QuantSpec
from stages.config import CheckpointConfig, DistillConfig, OptimConfig, ParallelConfig, StageConfig, TrainConfig
from stages.distributed import Process
from stages.run import StageJob, StageResult, run_stages

MODEL = ModelConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, ffn_size=64,
                    max_positions=64)  # fmt: skip
WORDS = "the model reads a word and then guesses what the next word of this small text will be".split()


def write_texts(path: Path, count: int = 80, seed: int = 0) -> Path:
    """JSON Lines of sentences from a small vocabulary."""
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 40)))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_chats(path: Path, count: int = 60, seed: int = 1) -> Path:
    """JSON Lines of one-turn conversations."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        question = " ".join(draw.choices(WORDS, k=6))
        answer = " ".join(reversed(question.split()))
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_data(folder: Path, **options: Any) -> DataConfig:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "texts.jsonl"
    if not path.exists():
        write_texts(path)
    source = SourceConfig(name="texts", path=str(path), max_passes=1e6)
    return DataConfig(sources=(source,), held_out_fraction=0.1, **options)


def chat_data(folder: Path) -> DataConfig:
    path = folder / "chats.jsonl"
    if not path.exists():
        write_chats(path)
    source = SourceConfig(name="chats", path=str(path), max_passes=1e6)
    return DataConfig(sources=(source,), kind="chat", held_out_fraction=0.1)


def pretrain_job(folder: Path, **changes: Any) -> StageJob:
    """Four rows of 32 tokens a step, fp32, a line for every step. `changes` go to the part that has the field."""
    config = StageConfig(
        data=text_data(folder), optim=OptimConfig(lr=3e-3, warmup_steps=2), steps=6, seq_len=32, global_batch=4,
    )  # fmt: skip
    job = StageJob(
        stage="pretrain", config=config, train=TrainConfig(log_every=1), model=MODEL,
        tokenizer=TokenizerConfig(vocab_size=300, train_bytes=20_000), parallel=ParallelConfig(timeout_seconds=60.0),
        checkpoint=CheckpointConfig(), output_dir=str(folder / "run"), cache_dir=str(folder / "cache"), init_from=None,
        resume=True, run_name="test", recipe_hash="0" * 12, wandb_mode="disabled", held_out_fraction=0.1,
    )  # fmt: skip
    return change(job, **changes)


def change(job: StageJob, **changes: Any) -> StageJob:
    """`job` with fields replaced, wherever they are."""
    for name, value in changes.items():
        if name in {item.name for item in fields(job)}:
            job = replace(job, **{name: value})
            continue
        for part in ("config", "train", "checkpoint", "parallel"):
            if hasattr(getattr(job, part), name):
                job = replace(job, **{part: replace(getattr(job, part), **{name: value})})
                break
        else:
            if not hasattr(job.config.optim, name):
                raise AttributeError(f"no part of a job has {name}")
            job = replace(job, config=replace(job.config, optim=replace(job.config.optim, **{name: value})))
    return job


def run_job(job: StageJob, rank: int = 0, world: int = 1) -> StageResult:
    """Run one job as this rank of the group that is up already."""
    return run_stages([job], Process(rank, world, rank))[0]


def read_metrics(job: StageJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


def losses(job: StageJob) -> list[float]:
    return [row["loss"] for row in read_metrics(job)]


def qat_checkpoint(folder: Path) -> Path:
    """A few steps of pre-training and of QAT of a model whose sizes the runtime takes; returns the QAT checkpoint."""
    model = replace(MODEL, hidden_size=64, head_dim=32, ffn_size=96)
    first = pretrain_job(folder, model=model, steps=10, lr=1e-2)
    aware = change(first, stage="qat", init_from=f"{first.output_dir}/pretrain", data=chat_data(folder), quant=QuantSpec(),
                   seq_len=64, lr=1e-3, steps=4, distill=DistillConfig(teacher="init"))  # fmt: skip
    return run_stages([first, aware], Process())[1].checkpoint
