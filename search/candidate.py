"""A point of the search space, the hard filters' limits, what is one change away, and checks of the lists of choices.

A dimension is a field of `Candidate`: an `int` field is a choice from an ordered list, `attention` a choice for every stored
block. All but those of `search.experts` are what `ModelConfig` has under the same name. A further dimension (bit width of a
part) is one more field with its default; lists, keys, neighbours, size and sampling follow from the fields. A dimension that
some candidates do not use needs a line in `Space.canonical` and in `Space.key`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, get_args

from modeling.config import AttentionKind, ModelConfig
from search import experts

KINDS: tuple[str, ...] = get_args(AttentionKind)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the space. Hashable; equal where all fields are."""

    num_layers: int
    """Stored blocks."""
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 64
    attention: tuple[AttentionKind, ...]
    """The kind of every stored block; as many as `num_layers`."""
    block_repeat: int = 1
    experts: int = 1
    """Capacity of the feed-forward's experts, as a multiple of the dense one; 1 is dense."""
    granularity: int = 1
    """Width of the dense feed-forward over that of one expert; idle where `experts` is 1."""
    shared_experts: int = 0
    """So many experts are merged into one that every token uses; idle where `experts` is 1."""


NUMBERS = tuple(item.name for item in fields(Candidate) if item.name != "attention")
DEFAULTS: dict[str, int] = {item.name: item.default for item in fields(Candidate) if item.default is not MISSING}
SIZES = tuple(name for name in NUMBERS if name not in experts.NAMES)
"""The numbers that every candidate uses."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Hard filters: a candidate that breaks one is never proposed."""

    max_without_full: int = 2
    """Executed layers in a row that may lack full attention (three or more break retrieval: MobileLLM-Flash)."""
    size_multiple: int = 32
    """hidden_size, ffn_size and the widths of queries and keys must be multiples: the packed file's group."""
    memory_bytes: int | None = None
    """Weights as packed plus the cache of `context` tokens; None is no cap."""
    context: int = 2048
    """In tokens."""
    weight_bits: float = 4
    group_size: int = 32
    kv_bits: float = 8

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            whole = "bits" not in name
            if value is not None and (isinstance(value, bool) or not isinstance(value, int if whole else int | float)
                                      or not math.isfinite(value)):  # fmt: skip
                raise ValueError(f"space.limits.{name}={value!r}; expected a {'whole ' * whole}number")
        for name in ("size_multiple", "context", "group_size", "weight_bits", "kv_bits"):
            if getattr(self, name) <= 0:
                raise ValueError(f"space.limits.{name}={getattr(self, name)} must be above 0")
        if self.max_without_full < 0:
            raise ValueError(f"space.limits.max_without_full={self.max_without_full} must be 0 or more")
        if self.memory_bytes is not None and self.memory_bytes < 1:
            raise ValueError(f"space.limits.memory_bytes={self.memory_bytes} must be at least 1; leave it out for no cap")

    def memory(self, config: ModelConfig) -> int:
        """Bytes of the packed weights and the cache at `context`."""
        return config.weight_bytes(self.weight_bits, self.group_size) + config.kv_bytes(self.context, self.kv_bits)

    def number_violations(self, candidate: Candidate) -> list[str]:
        """What is wrong with its sizes, whatever its pattern; in words."""
        found = []
        if candidate.num_heads % candidate.num_kv_heads:
            found.append(f"num_heads={candidate.num_heads} is not a multiple of num_kv_heads={candidate.num_kv_heads}")
        if candidate.head_dim % 2:
            found.append(f"head_dim={candidate.head_dim} is odd: RoPE rotates pairs")
        widths = {"hidden_size": candidate.hidden_size, "ffn_size": candidate.ffn_size,
                  "num_heads * head_dim": candidate.num_heads * candidate.head_dim,
                  "num_kv_heads * head_dim": candidate.num_kv_heads * candidate.head_dim}  # fmt: skip
        multiple = self.size_multiple
        found += [f"{name}={size} is not a multiple of {multiple}" for name, size in widths.items() if size % multiple]
        return found + experts.violations(candidate, multiple)


def single_changes(
    candidate: Candidate, choices: Mapping[str, tuple[int, ...]], allowed: Sequence[AttentionKind]
) -> Iterator[Candidate]:
    """What is one change away, filters aside: a number's next value, a layer of another kind, a layer more or less.

    What is idle is no change; where it comes into use it may be anything.
    """
    kinds = candidate.attention
    for name in SIZES if candidate.experts == 1 else NUMBERS:
        values = choices[name]
        at = values.index(getattr(candidate, name))
        for other in (*values[max(0, at - 1) : at], *values[at + 1 : at + 2]):
            if name != "num_layers":
                number: dict[str, Any] = {name: other}
                yield replace(candidate, **number)
            elif other < candidate.num_layers:
                for drop in itertools.combinations(range(len(kinds)), candidate.num_layers - other):
                    yield replace(candidate, num_layers=other, attention=_without(kinds, drop))
            else:
                for i in range(len(kinds) + 1):
                    for kind in allowed:
                        more = (kind,) * (other - candidate.num_layers)
                        yield replace(candidate, num_layers=other, attention=kinds[:i] + more + kinds[i:])
    if candidate.experts == 1:
        for more_of, granularity, shared in itertools.product(choices["experts"][1:2], *(choices[n] for n in experts.IDLE)):
            yield replace(candidate, experts=more_of, granularity=granularity, shared_experts=shared)
    for i, kind in itertools.product(range(len(kinds)), allowed):
        yield replace(candidate, attention=(*kinds[:i], kind, *kinds[i + 1 :]))


def _without(kinds: tuple[AttentionKind, ...], drop: Sequence[int]) -> tuple[AttentionKind, ...]:
    return tuple(kind for i, kind in enumerate(kinds) if i not in drop)


def check_choices(choices: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for a list that is missing, empty, out of order or of no whole numbers."""
    for name in NUMBERS:
        values = choices.get(name)
        if values is None:
            raise ValueError(f"space.{name} is missing; give the list of what it may be")
        if not values:
            raise ValueError(f"space.{name} is empty; give at least one value")
        least = min(1, DEFAULTS.get(name, 1))
        if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < least]:
            raise ValueError(f"space.{name} holds {wrong[0]!r}; expected whole numbers of at least {least}")
        if list(values) != sorted(set(values)):
            raise ValueError(f"space.{name}={list(values)} must ascend, each value once")


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Raises ValueError for kinds that are none, unknown or named twice."""
    if not kinds:
        raise ValueError("space.attention is empty; give at least [\"full\"]")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"space.attention holds {wrong[0]!r}; expected some of {', '.join(KINDS)}")
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"space.attention={list(kinds)} names a kind twice")


def check_tables(plain: Mapping[str, Any]) -> None:
    """Raises ValueError where a part of a space that has entries of its own is none."""
    for name in ("fixed", "limits"):
        if not isinstance(plain.get(name, {}), Mapping):
            raise ValueError(f"space.{name}={plain[name]!r} is no table; write [space.{name}] and its entries below")
