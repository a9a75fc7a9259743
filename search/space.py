"""What may be searched: lists of choices for a model's sizes, a kind of attention for every layer, hard filters.

What a candidate is and what a further dimension takes stands in `search.candidate`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from modeling.config import AttentionKind, ModelConfig
from search import experts
from search.candidate import (
    DEFAULTS,
    KINDS,
    NUMBERS,
    SIZES,
    Candidate,
    Limits,
    check_choices,
    check_kinds,
    check_tables,
    single_changes,
)
from search.counting import Counting

__all__ = ["KINDS", "NUMBERS", "SLOT", "Candidate", "Limits", "Space"]
SLOT = "attention."


@dataclass(frozen=True, kw_only=True)
class Space:
    """Choices, filters, and what all candidates share. Raises ValueError where no candidate is feasible."""

    choices: Mapping[str, tuple[int, ...]]
    """Of every number of a candidate: what it may be, ascending. Numbers with a default may be left out."""
    attention: tuple[AttentionKind, ...] = ("full", "window", "skip")
    """What a layer may be."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The other fields of `ModelConfig`: vocab_size, max_positions, window, tie_embeddings ...; `moe`: a router's rules."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", {**{name: (value,) for name, value in DEFAULTS.items()}, **self.choices})
        check_choices(self.choices)
        check_kinds(self.attention)
        known = {item.name for item in fields(ModelConfig)} - {item.name for item in fields(Candidate)}
        if unknown := sorted(set(self.fixed) - known):
            raise ValueError(f"space.fixed.{unknown[0]}: no such field of a model; expected some of {', '.join(sorted(known))}")
        if "vocab_size" not in self.fixed:
            raise ValueError("space.fixed lacks vocab_size; give the backbone's")
        experts.check_rule(self.fixed.get("moe", {}), self.choices["num_layers"][0])
        if not self._counting.feasible_numbers:
            raise ValueError(f"the space has no feasible point: {self._counting.why_empty()}")

    @property
    def has_experts(self) -> bool:
        """Whether some candidate is a mixture."""
        return self.choices["experts"] != (1,)

    @cached_property
    def _shown(self) -> tuple[str, ...]:
        """Numbers that the flat form has: a space of dense models knows nothing of experts, as its old databases do not."""
        return NUMBERS if self.has_experts else SIZES

    # --- candidates and configs ---

    def canonical(self, candidate: Candidate) -> Candidate:
        """The same model, with the first values of what it does not use."""
        if candidate.experts != 1:
            return candidate
        granularity, shared = (self.choices[name][0] for name in experts.IDLE)
        return replace(candidate, granularity=granularity, shared_experts=shared)

    def to_config(self, candidate: Candidate) -> ModelConfig:
        """The model. Raises ValueError where its sizes contradict each other."""
        sizes = {name: getattr(candidate, name) for name in (*SIZES, "attention")}
        return ModelConfig(**sizes, **{**self.fixed, "moe": experts.to_moe(candidate, self.fixed.get("moe", {}))})

    def from_config(self, config: ModelConfig) -> Candidate:
        """The candidate that a model is. Raises ValueError for one outside the lists or with another fixed part."""
        sizes = {name: getattr(config, name) for name in SIZES} | experts.sizes_of(config)
        candidate = self.canonical(Candidate(**sizes, attention=config.attention_kinds))
        if outside := self._outside(candidate):
            raise ValueError(outside[0])
        same = self.to_config(candidate)
        if config.moe is not None and same.moe is not None and config.moe != same.moe:
            name = next(name for name in experts.RULES if getattr(config.moe, name) != getattr(same.moe, name))
            raise ValueError(f"model.moe.{name}={getattr(config.moe, name)!r}, but the space fixes it to "
                             f"{getattr(same.moe, name)!r}")  # fmt: skip
        for name, value in self.fixed.items():
            if name != "moe" and getattr(config, name) != value:
                raise ValueError(f"model.{name}={getattr(config, name)!r}, but the space fixes it to {value!r}")
        return candidate

    def key(self, candidate: Candidate) -> str:
        """Equal for two candidates exactly if they are the same model; safe in file names and databases."""
        numbers = "-".join(str(getattr(candidate, name)) for name in (SIZES if candidate.experts == 1 else NUMBERS))
        return numbers + "-" + "".join(kind[0] for kind in candidate.attention[: candidate.num_layers])

    def from_key(self, key: str) -> Candidate:
        """The candidate of a key. Raises ValueError for what is none."""
        *numbers, kinds = key.split("-")
        names, letters = SIZES if len(numbers) == len(SIZES) else NUMBERS, {kind[0]: kind for kind in KINDS}
        try:
            values = {name: int(number) for name, number in zip(names, numbers, strict=True)}
            return self.canonical(Candidate(**values, attention=tuple(letters[letter] for letter in kinds)))  # type: ignore[misc]
        except (KeyError, ValueError):
            raise ValueError(f"{key!r} is not the key of a candidate; expected {len(SIZES)} numbers ({len(NUMBERS)} of a "
                             "mixture of experts) and one letter a layer, with - between") from None

    # --- flat form: what an optimizer sees ---

    def flat_choices(self) -> dict[str, list[Any]]:
        """Name -> values in order; slots `attention.0` ...; a shallow candidate uses the first of them."""
        slots = {f"{SLOT}{i}": list(self.attention) for i in range(max(self.choices["num_layers"]))}
        return {**{name: list(self.choices[name]) for name in self._shown}, **slots}

    def flatten(self, candidate: Candidate) -> dict[str, Any]:
        """The flat form, canonical: idle slots hold the first kind, idle numbers the first value."""
        candidate = self.canonical(candidate)
        slots = max(self.choices["num_layers"])
        kinds = candidate.attention + self.attention[:1] * (slots - len(candidate.attention))
        numbers = {name: getattr(candidate, name) for name in self._shown}
        return {**numbers, **{f"{SLOT}{i}": kind for i, kind in enumerate(kinds)}}

    def unflatten(self, flat: Mapping[str, Any]) -> Candidate:
        """Idle slots and numbers may hold anything. Raises ValueError for a missing name."""
        try:
            kinds = tuple(flat[f"{SLOT}{i}"] for i in range(flat["num_layers"]))
            return self.canonical(Candidate(**{name: flat[name] for name in self._shown}, attention=kinds))
        except KeyError as error:
            raise ValueError(f"a candidate lacks {error.args[0]}; expected the names of Space.flat_choices()") from None

    def repair(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The same candidate with idle slots cleared."""
        return self.flatten(self.unflatten(flat))

    # --- filters ---

    def violations(self, candidate: Candidate) -> list[str]:
        """Every hard filter the candidate breaks, in words; empty where it is feasible."""
        candidate = self.canonical(candidate)
        found = self._outside(candidate) + self.limits.number_violations(candidate)
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

    # --- size and sampling ---

    def size(self) -> int:
        """How many feasible candidates there are, exactly: patterns are counted, not listed."""
        return self._counting.size()

    def encodings(self) -> int:
        """How many candidates there are before the filters."""
        several = {name: len(values) for name, values in self.choices.items() if name not in ("num_layers", *experts.NAMES)}
        mixtures = math.prod(len(self.choices[name]) for name in experts.IDLE) * sum(n > 1 for n in self.choices["experts"])
        patterns = sum(len(self.attention) ** layers for layers in self.choices["num_layers"])
        return math.prod(several.values()) * (mixtures + (1 in self.choices["experts"])) * patterns

    def sample(self, draw: random.Random, count: int) -> list[Candidate]:
        """Feasible candidates, independent: experts uniform, sizes uniform over the feasible ones, then the pattern.

        Not uniform over the whole space, where nearly all candidates are of the deepest kind: 3^16 patterns against 3^10.
        """
        return [self._counting.sample(draw) for _ in range(count)]

    @cached_property
    def _counting(self) -> Counting:
        return Counting(self.choices, self.attention, self.limits, self.to_config)

    # --- neighbours ---

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """All feasible candidates one change away: a number's next value, a layer of another kind, a layer more or less."""
        changed = map(self.canonical, single_changes(self.canonical(candidate), self.choices, self.attention))
        found = {self.key(other): other for other in changed if not self.violations(other)}
        found.pop(self.key(candidate), None)
        return list(found.values())

    # --- plain description ---

    def to_dict(self) -> dict[str, Any]:
        """Plain values that TOML and JSON hold; `from_dict` gives the same space."""
        limits = {name: value for name, value in asdict(self.limits).items() if value is not None}
        numbers = {name: list(self.choices[name]) for name in self._shown}
        return {**numbers, "attention": list(self.attention), "fixed": dict(self.fixed), "limits": limits}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Space:
        """From `to_dict`, or from a table of a recipe. Raises ValueError that names the entry."""
        known = {*NUMBERS, "attention", "fixed", "limits"}
        if unknown := sorted(set(plain) - known):
            raise ValueError(f"space.{unknown[0]}: no such dimension; expected some of {', '.join(sorted(known))}")
        check_tables(plain)
        choices = {name: plain[name] for name in NUMBERS if name in plain}
        for name, values in [*choices.items(), ("attention", plain.get("attention", KINDS))]:
            if not isinstance(values, list | tuple):
                raise ValueError(f"space.{name}={values!r} is not a list; write [{values!r}] for a single choice")
        if unknown := sorted(set(plain.get("limits", {})) - {item.name for item in fields(Limits)}):
            raise ValueError(f"space.limits.{unknown[0]}: no such limit; expected some of "
                             f"{', '.join(item.name for item in fields(Limits))}")  # fmt: skip
        return cls(choices={name: tuple(values) for name, values in choices.items()},
                   attention=tuple(plain.get("attention", KINDS)), fixed=dict(plain.get("fixed", {})),
                   limits=Limits(**plain.get("limits", {})))  # fmt: skip
