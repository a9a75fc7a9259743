"""report.html: one page, complete in itself, that says what a run did.

Everything on it is computed from the files of the run directory; what is missing is said. The page fetches nothing
(a content policy forbids it), and text from the run, such as what the model generated, is escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.page import count, duration, render_page, write_page
from launch.report_data import Numbers, RunRecord, StageRecord, read_run
from launch.report_packed import operation_bars, packed_rows
from launch.report_plots import loss_chart, run_chart
from launch.report_verdicts import four_comparisons
from modeling.config import ModelConfig
from stages.config import STAGES, StageConfig, StageName

TITLES: dict[str, str] = {"pretrain": "Pre-training", "midtrain": "Mid-training", "sft": "SFT", "qat": "QAT"}
_SHOWN_METRICS = {"bits_per_byte": "bits per byte", "loss": "loss"}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory, whole or not at all, and return its path.

    Raises InputError where `run_dir` is not a folder.
    """
    return write_page(render(read_run(run_dir)), run_dir / "report.html")


def render(run: RunRecord) -> str:
    """The page as text."""
    stages = list(run.stages.values())
    return render_page(
        "report_template.html.j2",
        run=run,
        titles=TITLES,
        facts=_headline(run),
        comparisons=four_comparisons(run),
        losses=[(TITLES[stage.name], _objective(run, stage.name), loss_chart(stage)) for stage in stages],
        curves=[
            ("Learning rate", run_chart(stages, "lr", "learning rate")),
            ("Throughput", run_chart(stages, "tokens_per_second", "tokens per second")),
            ("Gradient norm before clipping", run_chart(stages, "grad_norm", "gradient norm", log=True)),
            *_expert_curves(run, stages),
        ],
        not_run=_not_run(run),
        stage_rows=_stage_rows(run),
        evaluation=_evaluation_rows(run),
        task_metrics=sorted({key for row in run.tasks.values() for key in row if key != "n"}),
        packed=packed_rows(run.measurements),
        operations=operation_bars(run.measurements),
        samples=_samples_by_prompt(run),
        lineage=[(stage.name, stage.lineage) for stage in stages if stage.lineage],
    )


def _headline(run: RunRecord) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the facts under the title; only those that are known."""
    facts = []
    if run.model is not None:
        model = run.model
        detail = f"{count(model.num_active_params())} active a token"
        facts.append(("Parameters", count(model.num_params()), detail))
        repeat = f" \N{MULTIPLICATION SIGN} {model.block_repeat}" if model.block_repeat > 1 else ""
        facts.append(("Shape", f"{model.num_layers}{repeat} layers, width {model.hidden_size}",
                      f"{model.num_heads} heads, {model.num_kv_heads} key/value, {_feed_forward(model)}, "
                      f"vocabulary {model.vocab_size:,}"))  # fmt: skip
    rows = _stage_rows(run)
    if rows:
        tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
        facts.append(("Tokens trained on", count(tokens), f"{sum(row['steps'] for row in rows):,.0f} optimizer steps"))
        facts.append(("Time in training steps", duration(seconds),
                      f"{count(tokens / seconds)} tokens per second on average" if seconds else ""))  # fmt: skip
    if run.recipe is not None:
        launch, parallel = run.recipe.launch, run.recipe.parallel
        facts.append(("Workers", str(launch.workers), f"{parallel.precision}, FSDP over {launch.workers}"
                      if launch.workers > 1 else parallel.precision))  # fmt: skip
    return facts


def _feed_forward(model: ModelConfig) -> str:
    moe = model.moe
    if moe is None:
        return f"feed-forward {model.ffn_size}"
    shared = f", one of {moe.shared_size} for every token" if moe.shared_size else ""
    return f"{moe.num_experts} experts of {moe.expert_size}, {moe.top_k} a token{shared}"


def _expert_curves(run: RunRecord, stages: list[StageRecord]) -> list[tuple[str, str | None]]:
    """How evenly a mixture's experts were used; nothing for a dense model."""
    if run.model is None or run.model.moe is None:
        return []
    share = "multiple of the even share"
    return [("Load of the busiest expert of any layer", run_chart(stages, "experts_load_max", share)),
            ("Load of the idlest expert of any layer", run_chart(stages, "experts_load_min", share)),
            ("Choices dropped at full experts", run_chart(stages, "experts_dropped", "share of choices"))]  # fmt: skip


def _stage_rows(run: RunRecord) -> list[dict[str, Any]]:
    """Size and speed of each stage that logged steps. Tokens are those of the stage alone."""
    rows = []
    for name, stage in run.stages.items():
        if stage.metrics:
            config: StageConfig | None = getattr(run.recipe, name, None)
            seconds = stage.training_seconds
            tokens = stage.metrics[-1].get("tokens", 0.0)
            rows.append({"name": name, "steps": stage.metrics[-1]["step"], "tokens": tokens, "seconds": seconds,
                         "rate": tokens / seconds if seconds else None, "wait": stage.data_wait_share,
                         "seq_len": config.seq_len if config else None,
                         "global_batch": config.global_batch if config else None})  # fmt: skip
    return rows


def _objective(run: RunRecord, name: StageName) -> str:
    config: StageConfig | None = getattr(run.recipe, name, None)
    if config is None:
        return ""
    what = "nats per assistant token" if config.data.kind == "chat" else "nats per token"
    if config.distill is None:
        return f"cross entropy, {what}"
    weight = config.distill.weight
    return f"KL to the teacher, {what}" if weight == 1 else f"{weight:g} KL + {1 - weight:g} cross entropy, {what}"


def _not_run(run: RunRecord) -> list[str]:
    """Stages of the recipe that logged nothing here."""
    planned = list(run.recipe.stages()) if run.recipe else list(run.stages)
    return [name for name in planned if name not in run.stages or not run.stages[name].metrics]


def _evaluation_rows(run: RunRecord) -> list[dict[str, Any]]:
    """One row a held-out set and metric; its cells are (before, after) of every stage, None where not scored."""
    names = dict.fromkeys(name for stage in run.stages.values() for name in (*stage.before, *stage.after))

    def cell(table: dict[str, Numbers], name: str, metric: str) -> float | None:
        return table.get(name, {}).get(metric)

    rows = []
    stages = run.stages.values()
    for name in names:
        for metric, label in _SHOWN_METRICS.items():
            cells = [(cell(stage.before, name, metric), cell(stage.after, name, metric)) for stage in stages]
            if any(value is not None for pair in cells for value in pair):
                rows.append({"name": name, "metric": label, "cells": cells})
    return rows


def _samples_by_prompt(run: RunRecord) -> dict[str, list[dict[str, str]]]:
    """Prompts in the order of the file, each with its stages in the order of training."""
    order: dict[str, int] = {name: place for place, name in enumerate(STAGES)}
    grouped: dict[str, list[dict[str, str]]] = {}
    for sample in sorted(run.samples, key=lambda sample: order.get(sample["stage"], len(order))):
        grouped.setdefault(sample["prompt"], []).append(sample)
    return {prompt: grouped[prompt] for prompt in dict.fromkeys(sample["prompt"] for sample in run.samples)}
