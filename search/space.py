"""What may be searched: lists of choices for a model's sizes, a kind of attention for every layer, hard filters.

A dimension is a field of `Candidate` that `ModelConfig` has under the same name: an `int` field is a choice from an ordered
list, `attention` a choice for every stored block. A further dimension (experts, granularity, bit width of a part) is one
more field with its default; lists, keys, neighbours, size and sampling follow from the fields. Only a dimension that
some candidates do not use needs a line in `Space.key`, as idle attention slots have.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, get_args

from modeling.config import AttentionKind, ModelConfig
from search.patterns import PatternCounts

KINDS: tuple[str, ...] = get_args(AttentionKind)
SLOT = "attention."


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


NUMBERS = tuple(item.name for item in fields(Candidate) if item.name != "attention")
DEFAULTS = {item.name: item.default for item in fields(Candidate) if item.default is not MISSING}


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


@dataclass(frozen=True, kw_only=True)
class Space:
    """Choices, filters, and what all candidates share. Raises ValueError where no candidate is feasible."""

    choices: Mapping[str, tuple[int, ...]]
    """Of every number of a candidate: what it may be, ascending."""
    attention: tuple[AttentionKind, ...] = ("full", "window", "skip")
    """What a layer may be."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of `ModelConfig`: vocab_size, max_positions, window, tie_embeddings ..."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _check_choices(self.choices)
        _check_kinds(self.attention)
        known = {item.name for item in fields(ModelConfig)} - {item.name for item in fields(Candidate)}
        if unknown := sorted(set(self.fixed) - known):
            raise ValueError(f"space.fixed.{unknown[0]}: no such field of a model; expected some of {', '.join(sorted(known))}")
        if "vocab_size" not in self.fixed:
            raise ValueError("space.fixed lacks vocab_size; give the backbone's")
        if not self._feasible_numbers:
            raise ValueError(f"the space has no feasible point: {self._why_empty()}")

    # --- candidates and configs ---

    def to_config(self, candidate: Candidate) -> ModelConfig:
        """The model. Raises ValueError where its sizes contradict each other."""
        return ModelConfig(**asdict(candidate), **self.fixed)

    def from_config(self, config: ModelConfig) -> Candidate:
        """The candidate that a model is. Raises ValueError for one outside the lists or with another fixed part."""
        candidate = Candidate(**{name: getattr(config, name) for name in NUMBERS}, attention=config.attention_kinds)
        for name, value in self.fixed.items():
            if getattr(config, name) != value:
                raise ValueError(f"model.{name}={getattr(config, name)!r}, but the space fixes it to {value!r}")
        if outside := self._outside(candidate):
            raise ValueError(outside[0])
        return candidate

    def key(self, candidate: Candidate) -> str:
        """Equal for two candidates exactly if they are the same model; safe in file names and databases."""
        numbers = "-".join(str(getattr(candidate, name)) for name in NUMBERS)
        return numbers + "-" + "".join(kind[0] for kind in candidate.attention[: candidate.num_layers])

    def from_key(self, key: str) -> Candidate:
        """The candidate of a key. Raises ValueError for what is none."""
        *numbers, kinds = key.split("-")
        letters = {kind[0]: kind for kind in KINDS}
        try:
            values = {name: int(number) for name, number in zip(NUMBERS, numbers, strict=True)}
            return Candidate(**values, attention=tuple(letters[letter] for letter in kinds))  # type: ignore[misc]
        except (KeyError, ValueError):
            raise ValueError(f"{key!r} is not the key of a candidate; expected {len(NUMBERS)} numbers and one letter a layer, "
                             "with - between") from None

    # --- flat form: what an optimizer sees ---

    def flat_choices(self) -> dict[str, list[Any]]:
        """Name -> values in order; slots `attention.0` ...; a shallow candidate uses the first of them."""
        slots = {f"{SLOT}{i}": list(self.attention) for i in range(max(self.choices["num_layers"]))}
        return {**{name: list(self.choices[name]) for name in NUMBERS}, **slots}

    def flatten(self, candidate: Candidate) -> dict[str, Any]:
        """The flat form, canonical: idle slots hold the first kind."""
        slots = max(self.choices["num_layers"])
        kinds = candidate.attention + self.attention[:1] * (slots - len(candidate.attention))
        numbers = {name: getattr(candidate, name) for name in NUMBERS}
        return {**numbers, **{f"{SLOT}{i}": kind for i, kind in enumerate(kinds)}}

    def unflatten(self, flat: Mapping[str, Any]) -> Candidate:
        """Idle slots may hold anything. Raises ValueError for a missing name."""
        try:
            kinds = tuple(flat[f"{SLOT}{i}"] for i in range(flat["num_layers"]))
            return Candidate(**{name: flat[name] for name in NUMBERS}, attention=kinds)
        except KeyError as error:
            raise ValueError(f"a candidate lacks {error.args[0]}; expected the names of Space.flat_choices()") from None

    def repair(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The same candidate with idle slots cleared."""
        return self.flatten(self.unflatten(flat))

    # --- filters ---

    def violations(self, candidate: Candidate) -> list[str]:
        """Every hard filter the candidate breaks, in words; empty where it is feasible."""
        found = self._outside(candidate) + self._number_violations(candidate)
        if len(candidate.attention) != candidate.num_layers:
            return [*found, f"attention names {len(candidate.attention)} layers, num_layers is {candidate.num_layers}"]
        if "full" not in candidate.attention:
            found.append("no layer has full attention")
        run = max((len(list(same)) for full, same in itertools.groupby(candidate.attention, lambda kind: kind == "full")
                   if not full), default=0)  # fmt: skip
        if run * candidate.block_repeat > self.limits.max_without_full:
            found.append(f"{run * candidate.block_repeat} layers in a row lack full attention, at most "
                         f"{self.limits.max_without_full} may")  # fmt: skip
        if not found and self.limits.memory_bytes is not None:
            needed = self.limits.memory(self.to_config(candidate))
            if needed > self.limits.memory_bytes:
                found.append(f"needs {needed} bytes at {self.limits.context} tokens, the cap is {self.limits.memory_bytes}")
        return found

    def feasible(self, flat: Mapping[str, Any]) -> bool:
        """Whether the flat form is a candidate without violations."""
        return not self.violations(self.unflatten(flat))

    def _outside(self, candidate: Candidate) -> list[str]:
        wrong = [f"{name}={getattr(candidate, name)} is not one of {list(self.choices[name])}"
                 for name in NUMBERS if getattr(candidate, name) not in self.choices[name]]  # fmt: skip
        kinds = sorted(set(candidate.attention) - set(self.attention))
        return wrong + [f"attention kind {kind!r} is not one of {list(self.attention)}" for kind in kinds]

    def _number_violations(self, candidate: Candidate) -> list[str]:
        found = []
        if candidate.num_heads % candidate.num_kv_heads:
            found.append(f"num_heads={candidate.num_heads} is not a multiple of num_kv_heads={candidate.num_kv_heads}")
        if candidate.head_dim % 2:
            found.append(f"head_dim={candidate.head_dim} is odd: RoPE rotates pairs")
        widths = {"hidden_size": candidate.hidden_size, "ffn_size": candidate.ffn_size,
                  "num_heads * head_dim": candidate.num_heads * candidate.head_dim,
                  "num_kv_heads * head_dim": candidate.num_kv_heads * candidate.head_dim}  # fmt: skip
        multiple = self.limits.size_multiple
        return found + [f"{name}={size} is not a multiple of {multiple}" for name, size in widths.items() if size % multiple]

    # --- size and sampling ---

    def size(self) -> int:
        """How many feasible candidates there are, exactly: patterns are counted, not listed."""
        return sum(count for _, count in self._feasible_numbers)

    def encodings(self) -> int:
        """How many candidates there are before the filters."""
        numbers = {name: values for name, values in self.choices.items() if name != "num_layers"}
        rest = 1
        for values in numbers.values():
            rest *= len(values)
        return rest * sum(len(self.attention) ** layers for layers in self.choices["num_layers"])

    def sample(self, draw: random.Random, count: int) -> list[Candidate]:
        """Feasible candidates, independent: sizes uniform over the feasible ones, then the pattern uniform over theirs.

        Not uniform over the whole space, where nearly all candidates are of the deepest kind: 3^16 patterns against 3^10.
        """
        return [self._sample_one(draw) for _ in range(count)]

    def _sample_one(self, draw: random.Random) -> Candidate:
        numbers, _ = draw.choice(self._feasible_numbers)
        patterns = self._patterns(numbers)
        allowed = self._allowed_counts(numbers)
        wanted = draw.choices([pair for pair, _ in allowed], [ways for _, ways in allowed])[0]
        return replace(numbers, attention=patterns.sample(draw, numbers.num_layers, *wanted))

    def _patterns(self, numbers: Candidate) -> PatternCounts:
        return PatternCounts.of(self.attention, self.limits.max_without_full // numbers.block_repeat)

    def _allowed_counts(self, numbers: Candidate) -> list[tuple[tuple[int, int], int]]:
        """((full layers, window layers), patterns with so many) for every pair that fits in memory."""
        counts = self._patterns(numbers).by_counts(numbers.num_layers)
        if self.limits.memory_bytes is None:
            return list(counts.items())
        return [(pair, ways) for pair, ways in counts.items() if self._memory(numbers, *pair) <= self.limits.memory_bytes]

    def _memory(self, numbers: Candidate, full: int, window: int) -> int:
        """Depends on how many layers are of a kind, not on which."""
        counts: tuple[tuple[AttentionKind, int], ...] = (
            ("full", full), ("window", window), ("skip", numbers.num_layers - full - window))
        kinds = tuple(kind for kind, count in counts for _ in range(count))
        return self.limits.memory(self.to_config(replace(numbers, attention=kinds)))

    @cached_property
    def _feasible_numbers(self) -> list[tuple[Candidate, int]]:
        """Every choice of numbers (its pattern empty) that has a feasible pattern, with how many it has."""
        found = []
        for values in itertools.product(*(self.choices[name] for name in NUMBERS)):
            numbers = Candidate(**dict(zip(NUMBERS, values, strict=True)), attention=())
            if self._number_violations(numbers):
                continue
            if ways := self._count_patterns(numbers):
                found.append((numbers, ways))
        return found

    def _count_patterns(self, numbers: Candidate) -> int:
        counts = self._patterns(numbers).by_counts(numbers.num_layers)
        cap = self.limits.memory_bytes
        # Most choices fit with their largest pattern, or not even with their smallest; only the rest is gone through.
        if not counts or cap is None or self._memory(numbers, *max(counts, key=lambda pair: (sum(pair), pair[0]))) <= cap:
            return sum(counts.values())
        return sum(ways for _, ways in self._allowed_counts(numbers))

    def _why_empty(self) -> str:
        first = replace(Candidate(**{name: self.choices[name][0] for name in NUMBERS}, attention=()))
        if wrong := self._number_violations(first):
            return f"already the first choices fail ({wrong[0]}), and so do all others; widen a list"
        if "full" not in self.attention:
            return "every candidate needs a layer with full attention; add \"full\" to attention"
        counts = self._patterns(first).by_counts(first.num_layers)
        if not counts:
            return "no pattern of layers passes max_without_full; raise it or add \"full\""
        smallest = min(self._memory(first, *pair) for pair in counts)
        return f"the smallest candidate needs {smallest} bytes, the cap is {self.limits.memory_bytes}; raise memory_bytes"

    # --- neighbours ---

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """All feasible candidates one change away: a number's next value, a layer of another kind, a layer more or less."""
        found = {self.key(other): other for other in self._changes(candidate) if not self.violations(other)}
        found.pop(self.key(candidate), None)
        return list(found.values())

    def _changes(self, candidate: Candidate) -> Iterator[Candidate]:
        kinds = candidate.attention
        for name in NUMBERS:
            values = self.choices[name]
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
                        for kind in self.attention:
                            more = (kind,) * (other - candidate.num_layers)
                            yield replace(candidate, num_layers=other, attention=kinds[:i] + more + kinds[i:])
        for i, kind in itertools.product(range(len(kinds)), self.attention):
            yield replace(candidate, attention=(*kinds[:i], kind, *kinds[i + 1 :]))

    # --- plain description ---

    def to_dict(self) -> dict[str, Any]:
        """Plain values that TOML and JSON hold; `from_dict` gives the same space."""
        limits = {name: value for name, value in asdict(self.limits).items() if value is not None}
        numbers = {name: list(self.choices[name]) for name in NUMBERS}
        return {**numbers, "attention": list(self.attention), "fixed": dict(self.fixed), "limits": limits}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Space:
        """From `to_dict`, or from a table of a recipe. Raises ValueError that names the entry."""
        known = {*NUMBERS, "attention", "fixed", "limits"}
        if unknown := sorted(set(plain) - known):
            raise ValueError(f"space.{unknown[0]}: no such dimension; expected some of {', '.join(sorted(known))}")
        choices = {name: plain[name] if name in plain else [DEFAULTS[name]] for name in NUMBERS
                   if name in plain or name in DEFAULTS}  # fmt: skip
        for name, values in [*choices.items(), ("attention", plain.get("attention", KINDS))]:
            if not isinstance(values, list | tuple):
                raise ValueError(f"space.{name}={values!r} is not a list; write [{values!r}] for a single choice")
        if unknown := sorted(set(plain.get("limits", {})) - {item.name for item in fields(Limits)}):
            raise ValueError(f"space.limits.{unknown[0]}: no such limit; expected some of "
                             f"{', '.join(item.name for item in fields(Limits))}")  # fmt: skip
        return cls(choices={name: tuple(values) for name, values in choices.items()},
                   attention=tuple(plain.get("attention", KINDS)), fixed=dict(plain.get("fixed", {})),
                   limits=Limits(**plain.get("limits", {})))  # fmt: skip


def _without(kinds: tuple[AttentionKind, ...], drop: Sequence[int]) -> tuple[AttentionKind, ...]:
    return tuple(kind for i, kind in enumerate(kinds) if i not in drop)


def _check_choices(choices: Mapping[str, tuple[int, ...]]) -> None:
    for name in NUMBERS:
        values = choices.get(name)
        if values is None:
            raise ValueError(f"space.{name} is missing; give the list of what it may be")
        if not values:
            raise ValueError(f"space.{name} is empty; give at least one value")
        if wrong := [value for value in values if isinstance(value, bool) or not isinstance(value, int) or value < 1]:
            raise ValueError(f"space.{name} holds {wrong[0]!r}; expected whole numbers of at least 1")
        if list(values) != sorted(set(values)):
            raise ValueError(f"space.{name}={list(values)} must ascend, each value once")


def _check_kinds(kinds: tuple[str, ...]) -> None:
    if not kinds:
        raise ValueError("space.attention is empty; give at least [\"full\"]")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"space.attention holds {wrong[0]!r}; expected some of {', '.join(KINDS)}")
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"space.attention={list(kinds)} names a kind twice")
