"""The optimizer behind the face of outside benchmarks: `factory(...)` gives an object with `ask` and `tell`.

Nothing is known beforehand of the names in `space`, and nothing is expected of outside functions but that they may fail. Where
cheap latency readings are to be had, at most `READINGS` are taken (`search.optim.latency_stage`).
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from search.optim.base import Domain, Flat, Goal
from search.optim.latency_stage import READINGS, LatencyStage
from search.optim.staged import Settings, Staged

__all__ = ["READINGS", "BenchSearch", "factory"]
log = logging.getLogger(__name__)


def factory(
    space: Mapping[str, Sequence[Any]], reference_point: Mapping[str, float], seed: int,
    measure_latency: Callable[[Flat], float] | None = None, repair: Callable[[Flat], Flat] | None = None,
) -> BenchSearch:
    """space: name -> ordered values; reference_point: {"loss": x, "ttft": seconds}, both minimised.

    measure_latency(config): one noisy reading in seconds; repair(config): the config with idle slots cleared. Raises
    ValueError.
    """
    choices, reference = _choices(space), _reference(reference_point)
    try:
        seed = operator.index(seed) % 2**63
    except TypeError:
        raise ValueError(f"seed is {seed!r}; expected a whole number") from None
    for name, function in (("measure_latency", measure_latency), ("repair", repair)):
        if function is not None and not callable(function):
            raise ValueError(f"{name} is {function!r}; expected a function of a config, or None")
    tidy = None if repair is None else Tidy(choices, repair)
    return BenchSearch(Domain(choices=choices, repair=tidy), reference, seed, measure_latency)


def _choices(space: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    if not isinstance(space, Mapping):
        raise ValueError(f"space is {space!r}; expected a mapping of names to lists of values")
    for name, values in space.items():
        if not isinstance(name, str):
            raise ValueError(f"space has the name {name!r}; expected text")
        if isinstance(values, str | Mapping | Set) or not isinstance(values, Iterable):
            raise ValueError(f"space[{name!r}] is {values!r}; expected a list of its values in order")
    return {name: list(values) for name, values in space.items()}


def _reference(point: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(point, Mapping):
        raise ValueError(f'reference_point is {point!r}; expected {{"loss": x, "ttft": y}}')
    if missing := {"loss", "ttft"} - set(point):
        raise ValueError(f"reference_point lacks {sorted(missing)[0]}; expected loss and ttft")
    for name in ("loss", "ttft"):
        if not math.isfinite(_number(point[name])):
            raise ValueError(f"reference_point[{name!r}] is {point[name]!r}; expected a number")
    return {name: float(point[name]) for name in ("loss", "ttft")}


def _number(value: Any) -> float:
    """NaN for what is no number."""
    try:
        return float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        return float("nan")


class BenchSearch:
    """See `factory`."""

    def __init__(
        self, domain: Domain, reference: Mapping[str, float], seed: int, measure: Callable[[Flat], float] | None
    ) -> None:
        goal = Goal(objectives={"ttft": float(reference["ttft"]), "loss": float(reference["loss"])})
        settings = Settings(initial=12 if measure is None else 16)
        self._search = Staged(domain, goal, seed, times=("ttft",), settings=settings, repeats=True)
        self._stage = None
        if measure is not None:
            self._stage = LatencyStage(self._search.encoder, goal.objectives["ttft"], seed, measure)
        self._predicts: bool | None = None
        """Whether the stage predicts; None before its first readings."""

    @property
    def readings(self) -> int:
        """Latency readings taken so far."""
        return 0 if self._stage is None else self._stage.taken

    def ask(self, n: int) -> list[tuple[int, Flat]]:
        """`n` candidates to evaluate: (token, config). None twice, until the space has no more."""
        if self._stage is not None and self._predicts is None:
            self._predicts = self._stage.prepare()
            if self._predicts:
                self._search.known["ttft"] = self._stage
            else:
                log.warning("hardly any of %d latency readings is a time above 0; ttft is learned from evaluations alone",
                            self._stage.taken)  # fmt: skip
        asked = self._search.ask(n)
        if self._stage is not None and self._predicts:
            self._stage.follow([config for _, config in asked])
        return asked

    def tell(self, token: int, values: Mapping[str, float] | None) -> None:
        """{"loss", "ttft"}, or None for an evaluation that failed; so did one whose loss or time is no number."""
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f'the answer is {values!r}; expected {{"loss": x, "ttft": y}}, or None for a failure')
        if values is not None:
            # Whatever else a benchmark says of an evaluation is its own.
            values = {name: _number(values[name]) for name in ("loss", "ttft") if name in values}
            values = values if all(map(math.isfinite, values.values())) else None
        self._search.tell(token, values)
        if values is not None and self._stage is not None:
            self._stage.learn(self._search.trials[token].config, values["ttft"])


class Tidy:
    """An outside `repair` that always gives every name of the space, and none else."""

    def __init__(self, choices: Mapping[str, Sequence[Any]], repair: Callable[[Flat], Flat | None]) -> None:
        self._choices, self._repair, self._failed = choices, repair, False

    def __call__(self, flat: Flat) -> Flat:
        """A slot that was left out holds its first value; where `repair` fails the candidate stays as it was."""
        changed = dict(flat)
        try:
            result = self._repair(changed)
            if not isinstance(result, Mapping | None):
                raise TypeError(f"it gave {result!r}, not a config")
        except Exception as error:  # somebody else's function: the evaluation will say what such a candidate is worth
            if not self._failed:
                log.warning("repair failed, the candidate is kept as it is: %s: %s", type(error).__name__, error)
            self._failed = True
            return flat
        repaired = changed if result is None else result  # None: it worked in place
        return {name: repaired[name] if name in repaired else values[0] for name, values in self._choices.items()}
