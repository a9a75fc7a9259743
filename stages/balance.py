"""Keeping experts evenly used, and saying how evenly they are.

Auxiliary-loss-free balancing (Wang et al. 2024, arXiv 2408.15664, algorithm 1): after each optimizer step an expert's
balance bias moves by `bias_rate` up where it had less than the mean load, down where it had more. The load is that of the
whole global batch: summed over micro-batches and over all workers, so that every worker moves its biases alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeling.decoder import Decoder
from modeling.moe import MoE, Router, RoutingRecord
from stages.config import MoETrainConfig
from stages.distributed import Process, all_reduce_sum


def moe_layers(model: Decoder) -> Iterator[MoE]:
    """The model's mixtures, in order."""
    for block in model.blocks:
        if isinstance(block.feed_forward, MoE):
            yield block.feed_forward


def new_record(model: Decoder, config: MoETrainConfig | None) -> RoutingRecord | None:
    """What a training forward pass is handed; None for a dense model."""
    if model.config.num_moe_layers == 0:
        return None
    config = config or MoETrainConfig()
    capacity = config.capacity_factor if config.dispatch == "capacity" else None
    return RoutingRecord(capacity_factor=capacity, balance_loss=config.balance == "loss")


def router_loss(record: RoutingRecord, config: MoETrainConfig | None, supervised: Tensor) -> Tensor:
    """z-loss and, where it is asked for, the balance loss, summed over layers and supervised tokens: an fp32 scalar.

    Args:
        supervised: bool [B, L]. A row's balance weighs as many tokens as are supervised in it, so that dividing by the
            global number of supervised tokens gives a mean that does not depend on how rows are shared out.
    """
    config = config or MoETrainConfig()
    total = torch.zeros((), device=supervised.device)
    for layer in record.layers:
        total = total + config.z_weight * layer.z[supervised].sum()
        if layer.balance is not None:
            total = total + config.balance_weight * (layer.balance * supervised.sum(-1)).sum()
    return total


@dataclass(frozen=True)
class _Totals:
    """Sums over forward passes, fp64, a row a stored layer."""

    load: Tensor
    """[layers, E]"""
    scalars: Tensor
    """[layers, 4]: choices, dropped choices, entropy in nats, squared log-sum-exp; the last two summed over tokens."""


class ExpertBalance:
    """Watches the routers of a model through training. One for a stage; `watch` a forward pass, `step` an optimizer step."""

    def __init__(self, model: Decoder, config: MoETrainConfig | None, process: Process) -> None:
        self.config, self.process = config or MoETrainConfig(), process
        self.repeat = model.config.block_repeat
        layers = list(moe_layers(model))
        self.routers: list[Router] = [layer.router for layer in layers]
        self.top_k = layers[0].moe.top_k
        self._step, self._window = self._zeros(layers[0].moe.num_experts), self._zeros(layers[0].moe.num_experts)

    def _zeros(self, experts: int) -> _Totals:
        whole = torch.zeros(len(self.routers), experts + 4, dtype=torch.float64, device=self.process.device)
        return _Totals(whole[:, :experts], whole[:, experts:])

    @torch.no_grad()
    def watch(self, record: RoutingRecord) -> None:
        """Add what a forward pass of this worker did."""
        for executed, layer in enumerate(record.layers):
            stored = executed // self.repeat
            self._step.load[stored] += layer.load
            said = (layer.load.sum(), layer.dropped, layer.entropy, layer.z.sum())
            self._step.scalars[stored] += torch.stack([value.double() for value in said])

    @torch.no_grad()
    def step(self) -> None:
        """Sum over workers, move the biases. Call on every worker, once an optimizer step."""
        experts = self._step.load.shape[1]
        whole = all_reduce_sum(torch.cat([self._step.load, self._step.scalars], dim=1), self.process)
        load = whole[:, :experts]
        if self.config.balance == "bias":
            moves = self.config.bias_rate * torch.sign(load.mean(1, keepdim=True) - load)
            for router, move in zip(self.routers, moves, strict=True):
                router.bias += move.to(router.bias.dtype)
        self._window.load.add_(load)
        self._window.scalars.add_(whole[:, experts:])
        self._step = self._zeros(experts)

    def row(self) -> dict[str, Any]:
        """What to log of the steps since the last row, a list entry a layer:

        `load` of each expert as a multiple of the even share, the largest and smallest of them, `dropped` choices as a
        share of all, `entropy` of the scores in nats a token, `z` (mean squared log-sum-exp of the logits).
        """
        window, self._window = self._window, self._zeros(self._window.load.shape[1])
        choices, dropped, entropy, z = window.scalars.clamp(min=0).unbind(1)
        tokens = (choices / self.top_k).clamp(min=1)
        load = window.load / window.load.mean(1, keepdim=True).clamp(min=1e-9)
        return {
            "load_max": _rounded(load.amax(1)), "load_min": _rounded(load.amin(1)), "load": _rounded(load),
            "dropped": _rounded(dropped / choices.clamp(min=1)), "entropy": _rounded(entropy / tokens),
            "z": _rounded(z / tokens),
        }  # fmt: skip


def _rounded(values: Tensor) -> Any:
    """As plain numbers of five digits: there is one for each expert of each layer on every line."""
    listed = values.tolist()
    return [[float(f"{one:.5g}") for one in item] if isinstance(item, list) else float(f"{item:.5g}") for item in listed]


def wandb_row(row: dict[str, Any]) -> dict[str, Any]:
    """A metrics row for W&B: one series a layer, the experts' loads as a histogram."""
    flat = {key: value for key, value in row.items() if key != "moe"}
    for name, layers in row.get("moe", {}).items():
        for index, value in enumerate(layers):
            flat[f"moe/{name}/{index:02d}"] = _histogram(value) if isinstance(value, list) else value
    return flat


def _histogram(values: list[float]) -> Any:
    return lambda wandb: wandb.Histogram(values)
