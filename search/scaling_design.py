"""Choose a model by the scaling law: the sizes that lose least within caps of memory, arithmetic and training.

    minimise L(N, D, E; x)   subject to   6 N D <= training FLOPs,  2 N <= FLOPs a token,  weights + cache <= memory

(MobileMoE, arXiv 2605.27358.) What is minimised over are models that can be built (`search/scaling_shapes.py`), not real
numbers. Each is held to the caps by what its own `ModelConfig` says of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from modeling.config import ModelConfig
from search.scaling_law import PUBLISHED_CHOICE, Choice, LawError, Prediction, ScalingLaw
from search.scaling_shapes import WIDTH_STEP, Caps, Rules, active_params, build, costs_of, layers_of, tokens_for


@dataclass(frozen=True, kw_only=True)
class Design:
    """A model within the caps, and what the law says of it."""

    config: ModelConfig
    experts: int
    choice: Choice | None
    """None for a dense model."""
    tokens: int
    prediction: Prediction
    costs: dict[str, float]
    """By cap: memory_bytes, token_flops, train_flops, of the config itself."""
    caps: Caps

    @property
    def shares(self) -> dict[str, float]:
        """How much of each cap is used, at most 1."""
        limits = {name: getattr(self.caps, name) for name in self.costs}
        return {name: self.costs[name] / limit for name, limit in limits.items() if limit is not None}


def designs(law: ScalingLaw, caps: Caps, rules: Rules | None = None) -> list[Design]:
    """The best model of each E that keeps every cap, the best of all first. Raises LawError where none does.

    Its line names the cap and the smallest value of it that would do while the others stay.
    """
    rules = rules or Rules()
    candidates = [candidate for family in _families(law, rules, caps.context) for candidate in _sized(family, law, caps)]
    if not candidates:
        raise LawError("no model can be built by these rules; allow other KV heads, experts or a larger width")
    kept = [candidate for candidate in candidates if candidate.keeps(caps)]
    if rules.inside and kept:
        inside = [candidate for candidate in kept if not candidate.warnings(law)]
        if not inside:
            raise LawError(f"no design within the caps is where the law was fitted ({candidates[0].range_words(law)}); "
                           "change the training FLOPs or tokens, or ask outside of it, with warnings")  # fmt: skip
        kept = inside
    found = [_best([c for c in kept if c.experts == experts], law, caps) for experts in sorted({c.experts for c in kept})]
    held = sorted((design for design in found if design is not None), key=lambda design: design.prediction.loss)
    if not held:
        raise LawError(_what_would_do(candidates, caps))
    return held


@dataclass(frozen=True)
class _Candidate:
    config: ModelConfig
    experts: int
    choice: Choice | None
    tokens: int
    loss: float
    active: float
    costs: dict[str, float]

    def keeps(self, caps: Caps, but: str = "") -> bool:
        """Every cap, or all but one."""
        return all(limit is None or name == but or self.costs[name] <= limit
                   for name in self.costs for limit in [getattr(caps, name)])  # fmt: skip

    def warnings(self, law: ScalingLaw) -> tuple[str, ...]:
        return law.warnings(self.active, self.tokens, self.experts, self.choice)

    @staticmethod
    def range_words(law: ScalingLaw) -> str:
        part = law.common
        return f"N {part.active[0]:.4g}B to {part.active[1]:.4g}B, D {part.tokens[0]:.4g}B to {part.tokens[1]:.4g}B"


def _families(law: ScalingLaw, rules: Rules, context: int) -> Iterator[tuple[ModelConfig, int, Choice | None]]:
    """One-layer models of every width and way to have experts."""
    choices = rules.choices or tuple(sorted(law.parts)) or (PUBLISHED_CHOICE,)
    most = law.most if law.common.experts[1] > 1 else 1  # a law of dense models says nothing of others
    for hidden in range(WIDTH_STEP, rules.max_hidden + 1, WIDTH_STEP):
        for kv_heads in rules.kv_heads:
            for experts in sorted({e for e in rules.experts if e <= most}):
                for choice in choices if experts > 1 else choices[:1]:
                    try:
                        config = build(hidden, 1, kv_heads, experts, choice, rules, context)
                    except LawError:
                        continue
                    yield config, experts, choice if experts > 1 else None


def _sized(family: tuple[ModelConfig, int, Choice | None], law: ScalingLaw, caps: Caps) -> Iterator[_Candidate]:
    """The family with each number of layers. Costs are the config's own, from two of them: they are linear in the layers."""
    one, experts, choice = family
    layers = np.array(layers_of(one.hidden_size))
    two = replace(one, num_layers=2)
    first, second = (costs_of(config, 1, caps) for config in (one, two))
    sizes = np.array([active_params(one, law.counts_embedding), active_params(two, law.counts_embedding)], float)
    active = sizes[0] + (layers - 1) * (sizes[1] - sizes[0])
    configs = [replace(one, num_layers=int(number)) for number in layers]
    tokens = [tokens_for(config, caps) for config in configs]
    losses = law.loss(active, tokens, experts, choice)
    for place, config in enumerate(configs):
        extra = int(layers[place]) - 1
        costs = {name: first[name] + extra * (second[name] - first[name]) for name in first}
        costs["train_flops"] *= tokens[place]
        yield _Candidate(config, experts, choice, tokens[place], float(losses[place]), float(active[place]), costs)


def _best(candidates: Sequence[_Candidate], law: ScalingLaw, caps: Caps) -> Design | None:
    """The first in order of loss whose own config keeps the caps."""
    for candidate in sorted(candidates, key=lambda item: item.loss):
        exact = replace(candidate, costs=costs_of(candidate.config, candidate.tokens, caps))
        if exact.keeps(caps):
            prediction = law.predict(candidate.active, candidate.tokens, candidate.experts, candidate.choice)
            return Design(config=candidate.config, experts=candidate.experts, choice=candidate.choice, tokens=candidate.tokens,
                          prediction=prediction, costs=exact.costs, caps=caps)  # fmt: skip
    return None


def _what_would_do(candidates: Sequence[_Candidate], caps: Caps) -> str:
    """Which cap nothing keeps, and what would do."""
    units = {"memory_bytes": "bytes of memory", "token_flops": "FLOPs a token", "train_flops": "training FLOPs"}
    for name, unit in units.items():
        others = [candidate for candidate in candidates if candidate.keeps(caps, but=name)]
        if getattr(caps, name) is not None and others:
            least = min(costs_of(item.config, item.tokens, caps)[name] for item in others)
            return (f"no model keeps {getattr(caps, name):.6g} {unit}; with the other caps as they are the smallest that "
                    f"would do is {rounded_up(least)} {unit}")  # fmt: skip
    smallest = {name: min(item.costs[name] for item in candidates) for name in units if getattr(caps, name) is not None}
    said = ", ".join(f"{rounded_up(value)} {units[name]} (given {getattr(caps, name):.6g})" for name, value in smallest.items())
    return f"no model keeps the caps together; each alone would have to be at least {said}"


def rounded_up(value: float) -> str:
    """Four digits, never less than the value."""
    if value <= 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(value)) - 3)
    shown = math.ceil(value / step)
    while float(f"{shown * step:.4g}") < value:
        shown += 1
    return f"{shown * step:.4g}"
