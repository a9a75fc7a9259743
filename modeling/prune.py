"""Cutting a smaller model out of a trained one: weights by slicing, in pure functions.

What is kept is `modeling.prune_plan`'s choice. What changes beside slicing:

Norms. RMSNorm divides by the root mean square over its channels, and the mean is over fewer of them after pruning. Let S
be the energy (sum of squares) of what a norm reads, S' that of the kept channels, D and D' their numbers. The norm gave
x_j w_j / sqrt(S / D) and would now give x_j w_j / sqrt(S' / D'), so the kept weights become

    w'_j = w_j sqrt((S' / S) (D / D'))

with S' / S the calibration pass's mean share of the kept channels. Where the dropped channels held no energy the factor is
sqrt(D / D') and exact (but for eps, which then counts D' / D as much as before); where all channels hold the same it is 1.

Steps. A block that runs more often than its source did adds a share of the source's output a pass (`BlockPlan.step`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from modeling.config import ModelConfig
from modeling.importance import Importance
from modeling.prune_plan import BlockPlan, PruningPlan, Share, SourceBlock, head_rows, plan_pruning, uncovered

__all__ = ["PruningPlan", "Share", "apply_plan", "plan_pruning", "prune", "uncovered"]


def prune(
    backbone: ModelConfig, state: Mapping[str, Tensor], importance: Importance, target: ModelConfig, *,
    share: Share = "first",
) -> dict[str, Tensor]:  # fmt: skip
    """The state dict of a `Decoder(target)` with the backbone's most important parts.

    Args:
        state: state dict of a `Decoder(backbone)`, on the device of `importance`. It is not changed.
        share: what a block that replaces several gets (`prune_plan.Share`).

    Raises ValueError where the backbone does not cover the target: which dimension, and by how much.
    """
    return apply_plan(plan_pruning(backbone, importance, target, share=share), backbone, state, importance, target)


def apply_plan(
    plan: PruningPlan, backbone: ModelConfig, state: Mapping[str, Tensor], importance: Importance, target: ModelConfig
) -> dict[str, Tensor]:
    """The weights that `plan` chose, each its own storage."""
    embed = state["embed.weight"][:, plan.hidden]
    result = {"embed.weight": embed, "norm.weight": _norm(state, importance, "norm", plan.hidden)}
    if not target.tie_embeddings:
        head = embed.clone() if backbone.tie_embeddings else state["head.weight"][:, plan.hidden]
        rows = head_rows(backbone, target)
        result["head.weight"] = head if rows is None else head[rows]
    for index, block in enumerate(plan.blocks):
        parts = [_block(state, importance, source, block, plan.hidden, backbone) for source in block.sources]
        for name in parts[0]:
            result[f"blocks.{index}.{name}"] = _mean([part[name] for part in parts])
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _block(
    state: Mapping[str, Tensor], importance: Importance, source: SourceBlock, block: BlockPlan, hidden: Tensor,
    backbone: ModelConfig,
) -> dict[str, Tensor]:  # fmt: skip
    """One source's part of a block, by the names within a block."""
    prefix = f"blocks.{source.index}."

    def weight(name: str) -> Tensor:
        return state[f"{prefix}{name}.weight"]

    result = {
        "feed_forward_norm.weight": _norm(state, importance, f"{prefix}feed_forward_norm", hidden),
        "feed_forward.gate.weight": weight("feed_forward.gate")[source.ffn][:, hidden],
        "feed_forward.up.weight": weight("feed_forward.up")[source.ffn][:, hidden],
        "feed_forward.down.weight": _scaled(weight("feed_forward.down")[hidden][:, source.ffn], block.step),
    }
    if block.kind == "skip":
        return result
    size = backbone.head_dim
    queries = (source.queries[:, None] * size + torch.arange(size, device=source.queries.device)).flatten()
    result |= {
        "attention_norm.weight": _norm(state, importance, f"{prefix}attention_norm", hidden),
        "attention.q.weight": weight("attention.q")[queries][:, hidden],
        "attention.k.weight": _merged(weight("attention.k"), source.key_values, size)[:, hidden],
        "attention.v.weight": _merged(weight("attention.v"), source.key_values, size)[:, hidden],
        "attention.o.weight": _scaled(weight("attention.o")[hidden][:, queries], block.step),
    }
    return result


def _norm(state: Mapping[str, Tensor], importance: Importance, name: str, hidden: Tensor) -> Tensor:
    """The kept weights of a norm, corrected for the mean over fewer channels (see the module's text)."""
    weight = state[f"{name}.weight"]
    if len(hidden) == len(weight):
        return weight.clone()
    energy = importance.norm_energy[name].double()
    share = float(energy[hidden].sum() / energy.sum())
    return weight[hidden] * math.sqrt(share * len(weight) / len(hidden))


def _merged(weight: Tensor, mixing: Tensor, size: int) -> Tensor:
    """Key or value projection [K' * size, D] of heads that are means of the old ones; plain copies stay bit-equal."""
    if bool((mixing == 1).sum(dim=1).all()):
        return weight.view(-1, size, weight.shape[1])[mixing.argmax(dim=1)].flatten(0, 1)
    heads = weight.view(-1, size * weight.shape[1])
    return (mixing.to(weight) @ heads).view(-1, weight.shape[1])


def _scaled(weight: Tensor, step: float) -> Tensor:
    return weight if step == 1.0 else weight * step


def _mean(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).mean(dim=0)
