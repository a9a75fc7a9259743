"""Which parts of a backbone a smaller model takes: pure choices over `Importance`, without touching a weight.

A target is covered when every part it has can be cut out of the backbone: `uncovered` says which cannot, in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeling.config import AttentionKind, ModelConfig
from modeling.importance import Importance

Share = Literal["first", "best", "mean"]
"""What a block gets that runs in place of several of the backbone's: the weights of the first, of the most important
one, or the mean of all."""

_AT_MOST = ("hidden_size", "ffn_size", "num_heads", "num_kv_heads")
_EQUAL = {
    "vocab_size": "the tokenizer decides it", "head_dim": "RoPE's angles depend on it", "qk_norm": "it is wiring",
    "rope_theta": "RoPE's angles depend on it", "rope_scaling": "RoPE's angles depend on it", "norm_eps": "it is wiring",
}  # fmt: skip


@dataclass(frozen=True)
class SourceBlock:
    """What is taken of one stored block of the backbone."""

    index: int
    ffn: Tensor
    """Kept FFN channels, int64 [target ffn_size], ascending."""
    queries: Tensor
    """Kept query heads, int64 [target num_heads], in the target's order; empty for a block without attention."""
    key_values: Tensor
    """[target num_kv_heads, backbone num_kv_heads]: each target head as a mean of the backbone's (rows sum to 1)."""


@dataclass(frozen=True)
class BlockPlan:
    """One stored block of the target: its sources, averaged, and the factor on what it adds to the residual stream."""

    kind: AttentionKind
    sources: tuple[SourceBlock, ...]
    step: float


@dataclass(frozen=True)
class PruningPlan:
    """All choices for one target."""

    hidden: Tensor
    """Kept channels of the residual stream, int64 [target hidden_size], ascending."""
    blocks: tuple[BlockPlan, ...]


def uncovered(backbone: ModelConfig, target: ModelConfig) -> list[str]:
    """Why `target` cannot be cut out of `backbone`: one phrase a dimension, empty where it can."""
    if backbone.moe is not None or target.moe is not None:
        return [f"moe: {'it' if target.moe is not None else 'the backbone'} has experts, and only dense models are cut"]
    problems = [
        f"{name} {getattr(target, name)} is larger than the backbone's {getattr(backbone, name)}"
        for name in _AT_MOST if getattr(target, name) > getattr(backbone, name)
    ]  # fmt: skip
    problems += [
        f"{name} {getattr(target, name)} is not the backbone's {getattr(backbone, name)} ({why})"
        for name, why in _EQUAL.items() if getattr(target, name) != getattr(backbone, name)
    ]  # fmt: skip
    if target.tie_embeddings and not backbone.tie_embeddings:
        problems.append("tie_embeddings is set, and the backbone's head and embedding are two matrices")
    if missing := _unsaid(backbone, target):
        problems.append(f"output_tokens: the backbone's head lacks {missing} of the tokens")
    more, repeat = target.block_repeat, backbone.block_repeat
    if more % repeat and repeat % more:
        problems.append(f"block_repeat {more} is no multiple or divisor of the backbone's {repeat}")
    elif target.num_layers > backbone.num_layers * max(repeat // more, 1):
        problems.append(f"num_layers {target.num_layers} is larger than the backbone's {backbone.num_layers}"
                        + (f" (each run {repeat} times)" if repeat > more else ""))
    elif _alignment(backbone, target, None) is None:
        problems.append(f"attention has {_attending(target)} attending blocks where the backbone's "
                        f"{_attending(backbone)} cannot stand in the same order")
    return problems


def plan_pruning(
    backbone: ModelConfig, importance: Importance, target: ModelConfig, *, share: Share = "first"
) -> PruningPlan:
    """Choose layers, residual channels, FFN channels and heads.

    Raises ValueError for a target that the backbone does not cover (every dimension is named), or for importance of
    another model.
    """
    if problems := uncovered(backbone, target):
        raise ValueError("the backbone does not cover this model: " + "; ".join(problems) + "; shrink it, or take a larger "
                         "backbone")  # fmt: skip
    importance.check(backbone)
    alignment = _alignment(backbone, target, importance)
    assert alignment is not None, "uncovered() looked"
    per_block, step = _sharing(backbone, target)
    blocks = []
    for index, kind in enumerate(target.attention_kinds):
        group = alignment[index * per_block : (index + 1) * per_block]
        sources = tuple(_source(backbone, importance, target, stored, kind) for stored in _shared(group, importance, share))
        blocks.append(BlockPlan(kind, sources, step))
    return PruningPlan(_top(importance.hidden, target.hidden_size), tuple(blocks))


def _unsaid(backbone: ModelConfig, target: ModelConfig) -> int:
    """How many tokens the target's head says and the backbone's does not."""
    if not backbone.output_tokens:
        return 0
    wanted = set(target.output_tokens or range(target.vocab_size))
    return len(wanted - set(backbone.output_tokens))


def head_rows(backbone: ModelConfig, target: ModelConfig) -> Tensor | None:
    """Rows of the backbone's head that the target's keeps, int64; None where that is all of them."""
    if target.output_tokens == backbone.output_tokens:
        return None
    place = {token: row for row, token in enumerate(backbone.output_tokens or range(backbone.vocab_size))}
    return torch.tensor([place[token] for token in target.output_tokens])


def _attending(config: ModelConfig) -> int:
    return sum(kind != "skip" for kind in config.attention_kinds)


def _units(backbone: ModelConfig, target: ModelConfig) -> list[int]:
    """What is aligned with the target's blocks: the backbone's stored blocks, or its passes where these fall apart."""
    passes = max(backbone.block_repeat // target.block_repeat, 1)
    return [stored for stored in range(backbone.num_layers) for _ in range(passes)]


def _sharing(backbone: ModelConfig, target: ModelConfig) -> tuple[int, float]:
    """How many units of the backbone one block of the target runs in place of, and the factor on its residual step.

    A block that runs r times where its source ran once would take r steps: each pass then takes 1/r of it, which to
    first order is one step again.
    """
    more = max(target.block_repeat // backbone.block_repeat, 1)
    if target.num_layers * more <= len(_units(backbone, target)):
        return more, 1.0
    return 1, 1.0 / more


def _alignment(backbone: ModelConfig, target: ModelConfig, importance: Importance | None) -> list[int] | None:
    """Stored blocks of the backbone for the target's units, in order; None where no order-preserving choice attends.

    The choice keeps the largest sum of block importance, less the importance of attention where the target skips it.
    """
    per_block, _ = _sharing(backbone, target)
    wanted = [kind for kind in target.attention_kinds for _ in range(per_block)]
    units, kinds = _units(backbone, target), backbone.attention_kinds

    def value(slot: int, unit: int) -> float:
        stored = units[unit]
        if wanted[slot] != "skip" and kinds[stored] == "skip":
            return float("-inf")
        if importance is None:
            return 0.0
        lost = float(importance.attention[stored]) if wanted[slot] == "skip" and kinds[stored] != "skip" else 0.0
        return float(importance.blocks[stored]) - lost

    chosen = _best_increasing(len(wanted), len(units), value)
    return None if chosen is None else [units[unit] for unit in chosen]


def _best_increasing(slots: int, units: int, value: Callable[[int, int], float]) -> list[int] | None:
    """Increasing units for slots 0..slots-1 with the largest sum of value(slot, unit); the earliest of equals."""
    # best[s][u]: the largest sum of slots s.. placed on units u..
    best = [[0.0] * (units + 1) for _ in range(slots + 1)]
    for slot in reversed(range(slots)):
        best[slot][units] = float("-inf")
        for unit in reversed(range(units)):
            best[slot][unit] = max(best[slot][unit + 1], value(slot, unit) + best[slot + 1][unit + 1])
    if best[0][0] == float("-inf"):
        return None
    chosen, unit = [], 0
    for slot in range(slots):
        while value(slot, unit) + best[slot + 1][unit + 1] < best[slot][unit]:
            unit += 1
        chosen.append(unit)
        unit += 1
    return chosen


def _shared(group: list[int], importance: Importance, share: Share) -> list[int]:
    """The stored blocks that a target block's weights come from."""
    distinct = list(dict.fromkeys(group))
    if share == "first":
        return distinct[:1]
    if share == "best":
        return [max(distinct, key=lambda stored: float(importance.blocks[stored]))]
    return distinct


def _source(
    backbone: ModelConfig, importance: Importance, target: ModelConfig, stored: int, kind: AttentionKind
) -> SourceBlock:
    ffn = _top(importance.ffn[stored], target.ffn_size)
    if kind == "skip":
        return SourceBlock(stored, ffn, torch.empty(0, dtype=torch.int64), torch.empty(0, backbone.num_kv_heads))
    queries = _query_heads(backbone, importance.heads[stored], target)
    group, kept = backbone.num_heads // backbone.num_kv_heads, target.num_heads // target.num_kv_heads
    key_values = torch.zeros(target.num_kv_heads, backbone.num_kv_heads)
    for position, head in enumerate(queries.tolist()):
        key_values[position // kept, head // group] += 1 / kept
    return SourceBlock(stored, ffn, queries, key_values)


def _query_heads(backbone: ModelConfig, scores: Tensor, target: ModelConfig) -> Tensor:
    """Kept query heads such that consecutive ones share a key/value head as the target's do.

    Where a target group is no larger than one of the backbone's, whole groups are chosen by their sum and then heads
    within them: keys and values stay as they were. Else groups must merge: the best heads in order are cut into the
    target's groups, and each reads the mean of its heads' keys and values (Ainslie et al. 2023, arXiv 2305.13245).
    """
    group, kept = backbone.num_heads // backbone.num_kv_heads, target.num_heads // target.num_kv_heads
    if kept > group:
        return _top(scores, target.num_heads)
    grouped = scores.reshape(backbone.num_kv_heads, group)
    groups = _top(grouped.topk(kept, dim=1).values.sum(dim=1), target.num_kv_heads)
    return torch.cat([index * group + _top(grouped[index], kept) for index in groups.tolist()])


def _top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending; of equals the first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return order[:count].sort().values
