"""Many architectures in one set of weights: a second source of a candidate's quality, without training each.

With W_1 ... W_m expert copies of every matrix of the largest model, an architecture `a` runs with

    plain       W_a = trim(W_1)                                        weights are shared as they are (m = 1)
    layer       W_a = trim(sum_i r_i(a) W_i)                           one mixture a matrix
    neuron      W_a = trim(sum_i diag(r_i(a)) W_i)                     one mixture an output row

where trim cuts out what `a` has (its first blocks, channels and heads) and the router r(a), a softmax over the experts, is a
small network over an encoding of `a`: Mixture-of-Supernets (Jawahar et al. 2024, arXiv 2306.04845, section 3). Embedding and
norms are shared as they are. The result of `weights` is an ordinary state dict of a `Decoder(a)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.importance import Importance, uniform_importance
from modeling.init import init_weights
from modeling.prune import apply_plan, plan_pruning

Routing = Literal["plain", "layer", "neuron"]
ROUTER_SIZE = 32
_KINDS = ("full", "window", "skip")


class Supernet(nn.Module):
    """Shared weights for every architecture that `largest` covers (`modeling.prune.uncovered`)."""

    def __init__(self, largest: ModelConfig, routing: Routing = "plain", experts: int = 2) -> None:
        """Raises ValueError for fewer than two experts to route between, or for a model with experts of its own."""
        super().__init__()
        if largest.moe is not None:
            raise ValueError("the largest model is a mixture of experts; a supernet shares the weights of dense models")
        if routing != "plain" and experts < 2:
            raise ValueError(f"{routing}-wise routing between {experts} experts; expected at least 2, or routing plain")
        self.largest, self.routing = largest, routing
        self.experts = 1 if routing == "plain" else experts
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in Decoder(largest).state_dict().items()}
        self.matrices = [name for name, shape in shapes.items() if len(shape) == 2 and name != "embed.weight"]
        self.weights_by_name = nn.ParameterDict({
            _key(name): nn.Parameter(torch.empty(self.experts, *shape) if name in self.matrices else torch.empty(shape))
            for name, shape in shapes.items()
        })  # fmt: skip
        self.router: nn.Sequential | None = None
        if routing != "plain":
            self.rows = [shapes[name][0] if routing == "neuron" else 1 for name in self.matrices]
            outputs = sum(self.rows) * self.experts
            self.router = nn.Sequential(nn.Linear(len(encode(largest, largest)), ROUTER_SIZE), nn.ReLU(),
                                        nn.Linear(ROUTER_SIZE, outputs))  # fmt: skip
        self._order = _first_of_everything(largest)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The router starts near even mixtures; experts are drawn so that such a mixture spreads as ordinary weights do.

        The even mean of m independent draws has 1 / sqrt(m) of their deviation, so each is drawn sqrt(m) times as wide.
        """
        for expert in range(self.experts):
            model = Decoder(self.largest)
            init_weights(model, seed + 1_000_003 * expert)
            for name, tensor in model.state_dict().items():
                target = self.weights_by_name[_key(name)]
                if name in self.matrices:
                    target[expert] = tensor * self.experts**0.5
                elif expert == 0:
                    target.copy_(tensor)
        if self.router is not None:
            generator = torch.Generator().manual_seed(seed)
            for parameter in self.router.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.0))

    def mixtures(self, candidate: ModelConfig) -> list[Tensor]:
        """For each matrix, softmax over the experts: [experts, 1 or rows, 1]."""
        if self.router is None:
            return [torch.ones(1, 1, 1, device=self.weights_by_name[_key("norm.weight")].device)] * len(self.matrices)
        device = next(self.router.parameters()).device
        scores = self.router(encode(candidate, self.largest).to(device)).view(self.experts, -1).softmax(dim=0)
        return [part.unsqueeze(-1) for part in scores.split(self.rows, dim=1)]

    def weights(self, candidate: ModelConfig) -> dict[str, Tensor]:
        """The state dict of a `Decoder(candidate)`, through which gradients reach the experts and the router.

        Raises ValueError where `largest` does not cover the candidate, by dimension.
        """
        plan = plan_pruning(self.largest, self._order, candidate)
        mixed = {name: self.weights_by_name[_key(name)] for name in map(_name, self.weights_by_name)}
        for name, mixture in zip(self.matrices, self.mixtures(candidate), strict=True):
            mixed[name] = mixed[name][0] if self.experts == 1 else (mixture * mixed[name]).sum(dim=0)
        return apply_plan(plan, self.largest, mixed, self._order, candidate)

    def hidden(self, candidate: ModelConfig, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """(normed hidden states [B, T, hidden], head [V, hidden]) of the candidate; logits are hidden @ head.T."""
        with torch.device("meta"):
            model = Decoder(candidate)
        weights = self.weights(candidate)
        hidden = functional_call(_Hidden(model), {f"model.{name}": t for name, t in weights.items()}, (tokens, positions))
        return hidden, weights["embed.weight"] if model.head is None else weights["head.weight"]

    @torch.no_grad()
    def extract(self, candidate: ModelConfig) -> dict[str, Tensor]:
        """The candidate's own weights, to train on or to score: an ordinary model again."""
        return {name: tensor.detach().clone() for name, tensor in self.weights(candidate).items()}


class _Hidden(nn.Module):
    """`Decoder.hidden` as a forward pass, for `functional_call`."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        return self.model.hidden(tokens, positions)


def encode(candidate: ModelConfig, largest: ModelConfig) -> Tensor:
    """An architecture as numbers in [0, 1]: its sizes as shares of the largest, and one-hot attention kinds a block."""
    sizes = [getattr(candidate, name) / getattr(largest, name)
             for name in ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads")]  # fmt: skip
    sizes.append(1 / candidate.block_repeat)
    kinds = [[float(kind == one) for one in _KINDS] for kind in candidate.attention_kinds]
    kinds += [[0.0] * len(_KINDS)] * (largest.num_layers - candidate.num_layers)
    return torch.tensor([*sizes, *(value for block in kinds for value in block)])


def sandwich(
    largest: ModelConfig, smallest: ModelConfig, draw: Callable[[random.Random], ModelConfig], count: int, seed: int
) -> Iterator[list[ModelConfig]]:
    """Architectures of each step: the largest, the smallest and `count` random ones (Yu et al. 2019, arXiv 1903.05134)."""
    generator = random.Random(seed)
    while True:
        yield [largest, smallest, *(draw(generator) for _ in range(count))]


def _first_of_everything(config: ModelConfig) -> Importance:
    """Importance by which pruning takes the first blocks, channels and heads, and leaves norms as they are."""
    uniform = uniform_importance(config)
    falling = torch.arange(config.num_layers, 0, -1, dtype=torch.float32)
    return replace(uniform, blocks=falling, attention=uniform.attention * 0)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _name(key: str) -> str:
    return key.replace("/", ".")
