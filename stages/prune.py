"""A smaller model cut out of a trained one, as a checkpoint that any stage starts from (`--init-from`)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.config import ModelConfig
from modeling.identity import config_key
from modeling.prune import PruningPlan, Share, apply_plan, plan_pruning
from stages.checkpoint import load_full, read_document, resolve, verify
from stages.checkpoint_files import COMMIT, file_hash
from stages.checkpoint_writer import CheckpointWriter
from stages.config import CheckpointConfig
from stages.errors import CheckpointError, InputError
from stages.importance import LayerScore, Variant
from stages.importance_file import load_scores
from stages.lineage import Lineage
from stages.state import code_revision, model_document, read_model, read_tokenizer


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """How parts are chosen. `benchmarks/prune_ranking.py` compares the choices (docs/pruning.md)."""

    variant: Variant = "wanda"
    """Score of channels and heads (`stages/importance.py`)."""
    layers: LayerScore = "cosine"
    """Score of blocks, and of their attention."""
    share: Share = "first"
    """What a block gets that runs in place of several (`modeling/prune_plan.py`)."""


def prune_checkpoint(
    backbone: str | Path, importance: str | Path, target: ModelConfig, output: str | Path,
    options: PruneOptions = PruneOptions(),  # noqa: B008 - frozen
) -> Path:  # fmt: skip
    """Write `output/checkpoints/step-000000`: a `target` with the backbone's weights, its tokenizer, its tokens seen.

    Args:
        backbone: a run, stage or checkpoint, not quantization-aware.
        importance: the JSON of this very checkpoint's calibration (`stages.importance_file`).
        target: its RoPE base and longest sequence are taken from the backbone, whose stages may have changed them.

    Returns the checkpoint. Raises InputError for a target that is not covered (every dimension is named) or importance
    of another checkpoint, CheckpointError for damage.
    """
    checkpoint = resolve(backbone)
    config, quant = read_model(checkpoint)
    if quant is not None:
        raise InputError(f"{checkpoint} is quantization-aware; prune the checkpoint before qat, and train qat after")
    scores, about = load_scores(importance)
    if about.get("commit_sha256") != file_hash(checkpoint / COMMIT) or scores.config != config:
        raise InputError(f"{importance} is the importance of {about.get('checkpoint')}, not of {checkpoint}; "
                         "calibrate this one")
    target = inherit_positions(target, config)
    chosen = scores.importance(options.variant, options.layers)
    try:
        plan = plan_pruning(config, chosen, target, share=options.share)
    except ValueError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    verify(checkpoint)
    state = apply_plan(plan, config, load_full(checkpoint, "model."), chosen, target)
    _check_finite(state, checkpoint)
    parent = Lineage.from_dict(read_document(checkpoint, "lineage"))
    lineage = Lineage(
        parent=str(checkpoint), recipe_hash=parent.recipe_hash, data_fingerprint=parent.data_fingerprint,
        tokens_seen=parent.tokens_seen, stage="prune", step=0, revision=code_revision(),
        pruning={"importance": Path(importance).stem, "calibration": about.get("calibration"), "candidate": config_key(target),
                 **dataclasses.asdict(options), "backbone": dataclasses.asdict(config), "blocks": describe_plan(plan)},
    )  # fmt: skip
    writer = CheckpointWriter(Path(output) / "checkpoints", CheckpointConfig(asynchronous=False, keep=1))
    documents: dict[str, dict[str, Any] | bytes] = {
        "model": model_document(target, None), "lineage": lineage.to_dict(),
        "tokenizer.json": read_tokenizer(checkpoint).to_json().encode(),
    }  # fmt: skip
    writer.save(0, {f"model.{name}": tensor for name, tensor in state.items()}, documents)
    return resolve(output)


def inherit_positions(target: ModelConfig, backbone: ModelConfig) -> ModelConfig:
    """`target` with what a stage may have changed since the backbone's recipe was written (`stages.kinds.stage_model`)."""
    return replace(target, rope_theta=backbone.rope_theta, max_positions=backbone.max_positions)


def describe_plan(plan: PruningPlan) -> list[dict[str, Any]]:
    """Which stored block of the backbone each block came from, in JSON's types."""
    return [{"from": [source.index for source in block.sources], "attention": block.kind, "step": block.step}
            for block in plan.blocks]  # fmt: skip


def _check_finite(state: dict[str, Tensor], checkpoint: Path) -> None:
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{checkpoint}: {name} holds NaN or infinity after pruning; take an earlier checkpoint")
