"""A mixture of experts in place of a feed-forward: router, experts, shared expert.

MobileMoE (arXiv 2605.27358) routes as DeepSeek-V3 does (arXiv 2412.19437, equations 12 to 16): scores are sigmoids of fp32
logits; a balance bias is added for choosing only; the chosen scores, unbiased and normalised, are the mixing weights.

Dimensions: B rows, L tokens a row, T = B L, D hidden size, E routed experts, k of them a token, F width of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import DispatchPlan, combine_rows, gather_rows, plan_capacity, plan_dropless
from modeling.config import ModelConfig
from modeling.experts import Experts
from modeling.feed_forward import FeedForward


@dataclass(frozen=True)
class LayerRouting:
    """What one router did in one forward pass."""

    load: Tensor
    """int64 [E]: tokens that chose each expert, before any was dropped."""
    dropped: Tensor
    """int64 []: choices that found their expert full."""
    entropy: Tensor
    """fp32 []: summed over tokens, in nats, of the scores as a distribution over experts."""
    z: Tensor
    """fp32 [B, L]: squared log-sum-exp of the logits, with gradient (ST-MoE, arXiv 2202.08906, equation 5)."""
    balance: Tensor | None
    """fp32 [B]: E / (k L) * sum over experts of its tokens times its mean score share in the row, with gradient; 1 where
    all is even (Switch Transformer, arXiv 2101.03961, equation 4, a row at a time)."""


class RoutingRecord:
    """Handed to a forward pass in training: how to dispatch, and what became of it, a layer after the other.

    Not a dataclass: of those FSDP makes copies as they pass from block to block, and entries would go into the copies.
    """

    def __init__(self, capacity_factor: float | None = None, balance_loss: bool = False) -> None:
        self.capacity_factor = capacity_factor
        """Slots an expert has, as a multiple of an even share; None drops nothing."""
        self.balance_loss = balance_loss
        self.layers: list[LayerRouting] = []


class Router(nn.Module):
    """Chooses `top_k` experts a token. Always in fp32: a rounded logit moves a token to another expert."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.weight = nn.Parameter(torch.empty(self.moe.num_experts, config.hidden_size))
        # State, not a parameter: training moves it by load, no gradient reaches it.
        self.register_buffer("bias", torch.zeros(self.moe.num_experts))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Experts int64 [T, k], mixing weights fp32 [T, k], logits and scores fp32 [T, E] of rows [T, D]."""
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.float(), self.weight.float())
        scores = logits.sigmoid() if self.moe.score == "sigmoid" else logits.softmax(-1)
        experts = choose(scores.detach() + self.bias, self.moe.top_k)
        mix = scores.gather(1, experts)
        if self.moe.normalize:
            mix = mix / mix.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return experts, mix * self.moe.route_scale, logits, scores


def choose(scores: Tensor, k: int) -> Tensor:
    """Indices int64 [T, k] of the k largest of [T, E], the lowest of equals first: `topk` promises no order of equals.

    NaN counts as the largest, so that a broken router gives valid experts, and a NaN in the loss.
    """
    left, chosen = scores.clone(), []
    for _ in range(k):
        best = left.argmax(-1, keepdim=True)
        chosen.append(best)
        left.scatter_(-1, best, float("-inf"))
    return torch.cat(chosen, -1)


class MoE(nn.Module):
    """shared(x) + sum over the chosen experts of mix * expert(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.moe = config.moe
        self.router = Router(config)
        self.experts = Experts(config.moe.num_experts, config.hidden_size, config.moe.expert_size)
        shared = config.moe.shared_size
        self.shared = FeedForward(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor, record: RoutingRecord | None = None) -> Tensor:
        """[B, L, D] to [B, L, D]; without a record nothing is dropped and nothing noted."""
        rows = x.reshape(-1, x.shape[-1])
        experts, mix, logits, scores = self.router(rows)
        plan = self._plan(experts, None if record is None else record.capacity_factor)
        mixed = combine_rows(self.experts(gather_rows(rows, plan), plan.counts), mix, plan).view_as(x)
        if record is not None:
            record.layers.append(self._note(plan, experts, logits, scores, x.shape[:2], record.balance_loss))
        return mixed if self.shared is None else self.shared(x) + mixed

    def _plan(self, experts: Tensor, capacity_factor: float | None) -> DispatchPlan:
        if capacity_factor is None:
            return plan_dropless(experts, self.moe.num_experts)
        capacity = math.ceil(capacity_factor * experts.numel() / self.moe.num_experts)
        return plan_capacity(experts, self.moe.num_experts, capacity)

    def _note(
        self, plan: DispatchPlan, experts: Tensor, logits: Tensor, scores: Tensor, shape: torch.Size, balance_loss: bool
    ) -> LayerRouting:
        with torch.no_grad():
            shares = scores / scores.sum(-1, keepdim=True)
            entropy = -torch.xlogy(shares, shares).sum()
        z = logits.logsumexp(-1).square().view(shape)
        balance = self._balance(experts, scores, shape) if balance_loss else None
        return LayerRouting(plan.load, plan.dropped, entropy, z, balance)

    def _balance(self, experts: Tensor, scores: Tensor, shape: torch.Size) -> Tensor:
        rows, length = shape
        chosen = torch.zeros(rows, self.moe.num_experts, device=scores.device)
        chosen.scatter_add_(1, experts.view(rows, -1), torch.ones_like(experts, dtype=chosen.dtype).view(rows, -1))
        shares = (scores / scores.sum(-1, keepdim=True)).view(rows, length, -1).mean(1)
        return (chosen * shares).sum(-1) * (self.moe.num_experts / (self.moe.top_k * length))
