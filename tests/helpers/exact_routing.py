"""The runtime's router restated in plain loops: which experts a token has, and with which weights (`routing.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from modeling.moe_config import MoEConfig
from tests.helpers.exact_floats import LANES, exponential, fma, tree_sum

LARGEST = torch.finfo(torch.float32).max


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """[T, E] of x [T, H] and weight [E, H]: 16 lanes over the columns in order, then their tree."""
    acc = torch.zeros(len(x), len(weight), LANES)
    for a, w in zip(x.split(LANES, 1), weight.split(LANES, 1), strict=True):
        acc = fma(a[:, None].expand_as(acc), w[None].expand_as(acc), acc)
    return tree_sum(acc)[..., 0]


def route(found: Tensor, bias: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, k], ids ascending, and weights [T, k] of logits [T, E]."""
    rows = [_route_row(_finite(row), bias, moe) for row in found]
    return torch.stack([ids for ids, _ in rows]), torch.stack([weights for _, weights in rows])


def _route_row(row: Tensor, bias: Tensor, moe: MoEConfig) -> tuple[Tensor, Tensor]:
    scores = _softmax(row) if moe.score == "softmax" else 1.0 / (1.0 + exponential(-row))
    left = _finite(scores + bias).tolist()
    chosen: list[int] = []
    for _ in range(moe.top_k):
        rest = [e for e in range(len(left)) if e not in chosen]
        chosen.append(max(rest, key=lambda e: (left[e], -e)))
    ids = torch.tensor(sorted(chosen))
    weights = scores[ids]
    if moe.normalize:
        total = torch.tensor(0.0)
        for weight in weights:
            total = total + weight
        weights = weights / total.clamp(min=torch.finfo(torch.float32).tiny)
    return ids, weights * torch.tensor(moe.route_scale, dtype=torch.float32)


def _softmax(row: Tensor) -> Tensor:
    powers = exponential((row - row.max()).clamp(min=-LARGEST))
    lanes = torch.zeros(LANES)
    for part in powers.split(LANES):
        lanes[: len(part)] += part
    return powers / tree_sum(lanes)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=LARGEST, posinf=LARGEST, neginf=-LARGEST)
