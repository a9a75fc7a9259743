"""Experts as dimensions of a space: how much of them, how fine, how many of them every token uses.

The dense feed-forward of width `ffn_size`, taken `experts` times, is cut into `experts * granularity` fine experts of width
`ffn_size / granularity`. `shared_experts` of them are merged into one that every token uses; of the others a token uses as
many as bring it to `granularity`, so that as much of it is active as of the dense one. MobileMoE has 8, 8 and 4: 60 routed
experts, 4 of them for a token, and a shared one that is 4 wide. With `experts` 1 a model is dense, and the other two are idle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_args

from modeling.moe_config import MoEConfig, ScoreFunction

if TYPE_CHECKING:
    from modeling.config import ModelConfig
    from search.candidate import Candidate

NAMES = ("experts", "granularity", "shared_experts")
IDLE = NAMES[1:]
"""Without effect in a dense model."""
RULES: dict[str, Any] = {item.name: item.default for item in fields(MoEConfig)
                         if item.default is not MISSING and item.name != "shared_size"}  # fmt: skip
"""What is no size of a mixture: how the router chooses, and blocks that stay dense. All candidates of a space share them."""


def to_moe(candidate: Candidate, rule: Mapping[str, Any]) -> MoEConfig | None:
    """The mixture of a candidate; None for a dense one. Raises ValueError where its sizes contradict each other."""
    if candidate.experts == 1:
        return None
    if wrong := violations(candidate, 1):
        raise ValueError(wrong[0])
    width, shared = candidate.ffn_size // candidate.granularity, candidate.shared_experts
    return MoEConfig(num_experts=candidate.experts * candidate.granularity - shared, top_k=candidate.granularity - shared,
                     expert_size=width, shared_size=shared * width, **rule)  # fmt: skip


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The three numbers of a mixture; only that it is dense of a dense model. Raises ValueError for what they cannot say."""
    moe = config.moe
    if moe is None:
        return {"experts": 1}
    granularity, shared = config.ffn_size // moe.expert_size, moe.shared_size // moe.expert_size
    experts = (moe.num_experts + shared) // max(granularity, 1)
    found = dict(zip(NAMES, (experts, granularity, shared), strict=True))
    have = (granularity * moe.expert_size, shared * moe.expert_size, experts * granularity, granularity - shared)
    if experts < 2 or have != (config.ffn_size, moe.shared_size, moe.num_experts + shared, moe.top_k):
        raise ValueError(f"model.moe has {moe.num_experts} experts of {moe.expert_size}, {moe.top_k} a token, and "
                         f"{moe.shared_size} shared: with ffn_size={config.ffn_size} no experts, granularity and "
                         "shared_experts give that")  # fmt: skip
    return found


def rule_of(moe: MoEConfig) -> dict[str, Any]:
    """What all candidates take over, as `space.fixed.moe` has it."""
    return {name: getattr(moe, name) for name in RULES}


def violations(candidate: Candidate, multiple: int) -> list[str]:
    """What is wrong with a mixture's sizes, in words; nothing is with a dense one's."""
    if candidate.experts == 1:
        return []
    ffn, granularity, shared = candidate.ffn_size, candidate.granularity, candidate.shared_experts
    found = []
    if ffn % granularity:
        found.append(f"ffn_size={ffn} is not a multiple of granularity={granularity}")
    elif ffn // granularity % multiple:
        found.append(f"ffn_size={ffn} of granularity={granularity} makes experts of {ffn // granularity}, not a multiple of "
                     f"{multiple}")  # fmt: skip
    if shared >= granularity:
        found.append(f"shared_experts={shared} leaves no expert to choose at granularity={granularity}; expected fewer")
    return found


def check_rule(rule: Any, fewest_layers: int) -> None:
    """Raises ValueError for a `space.fixed.moe` that is none."""
    if not isinstance(rule, Mapping):
        raise ValueError(f"space.fixed.moe={rule!r}; expected a table of {', '.join(RULES)}")
    if unknown := sorted(set(rule) - set(RULES)):
        raise ValueError(f"space.fixed.moe.{unknown[0]}: no rule of a router; expected some of {', '.join(RULES)} (sizes are "
                         f"dimensions: {', '.join(NAMES)})")  # fmt: skip
    given = {**RULES, **rule}
    score, scale, dense = given["score"], given["route_scale"], given["dense_layers"]
    problems = {
        "score": None if score in get_args(ScoreFunction) else f"one of {', '.join(get_args(ScoreFunction))}",
        "normalize": None if isinstance(given["normalize"], bool) else "true or false",
        "route_scale": None if _number(scale) and 0 < scale < math.inf else "a number above 0",
        "dense_layers": None if isinstance(dense, int) and _number(dense) and 0 <= dense < fewest_layers
        else f"0 to {fewest_layers - 1}, below the fewest num_layers",
    }  # fmt: skip
    for name, expected in problems.items():
        if expected is not None:
            raise ValueError(f"space.fixed.moe.{name}={given[name]!r}; expected {expected}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
