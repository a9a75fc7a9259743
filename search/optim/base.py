"""What every optimizer shares: the domain it searches, the goal, tokens, duplicates, failures, its state."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

Flat = dict[str, Any]
"""A candidate as an optimizer sees it: name -> one of the name's values."""
Values = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Names with their ordered values. Two candidates that `repair` makes equal are one candidate."""

    choices: Mapping[str, Sequence[Any]]
    repair: Callable[[Flat], Flat] | None = None
    """Clears what has no effect in this candidate (slots of layers that it does not have)."""
    feasible: Callable[[Flat], bool] | None = None
    """Hard filters; None where everything may be tried."""

    def __post_init__(self) -> None:
        if empty := [name for name, values in self.choices.items() if not len(values)]:
            raise ValueError(f"{empty[0]} has no values; give at least one")

    def canonical(self, flat: Flat) -> Flat:
        return dict(self.repair(dict(flat))) if self.repair else dict(flat)

    def key(self, canonical: Flat) -> str:
        """Equal exactly for equal canonical candidates."""
        return json.dumps([canonical[name] for name in self.choices], default=str)

    def is_feasible(self, canonical: Flat) -> bool:
        return self.feasible is None or self.feasible(canonical)

    def random(self, draw: np.random.Generator, tries: int = 10_000) -> Flat:
        """Canonical and feasible. Raises ValueError where none of many draws is."""
        for _ in range(tries):
            flat = self.canonical({name: values[int(draw.integers(len(values)))] for name, values in self.choices.items()})
            if self.is_feasible(flat):
                return flat
        raise ValueError(f"none of {tries} random candidates passes the filters; widen the space or give a start")


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is minimised, and what may not be exceeded."""

    objectives: Mapping[str, float]
    """Name -> reference: a value that is just no longer of use, in the user's units. Smaller is better; negate a rate."""
    limits: Mapping[str, float] = field(default_factory=dict)
    """Name -> largest value allowed. A name may be an objective too."""

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("a goal needs at least one objective; give a name and its reference value")
        for name, value in {**self.objectives, **self.limits}.items():
            if not math.isfinite(value):
                raise ValueError(f"the reference or limit of {name} is {value}; expected a number")

    @property
    def metrics(self) -> tuple[str, ...]:
        """All names that a finished trial must bring."""
        return (*self.objectives, *(name for name in self.limits if name not in self.objectives))


@dataclass
class Trial:
    """A question and its answer."""

    token: int
    config: Flat
    key: str
    status: Literal["pending", "ok", "failed"] = "pending"
    values: dict[str, float] | None = None
    noise: dict[str, float] | None = None
    """Standard deviations of `values`, where they are known."""


class Optimizer(Protocol):
    """Same seed and same answers in the same order: same questions."""

    def ask(self, n: int) -> list[tuple[int, Flat]]:
        """`n` candidates to evaluate now, knowing those still pending; fewer only where the space has no more."""
        ...

    def tell(self, token: int, values: Values | None, noise: Values | None = None) -> None:
        """The answer to a question; None for a failure, which never becomes a value. Values told a second time correct
        the first, as when a device was found to have drifted. Raises ValueError."""
        ...

    def attach(self, config: Flat, values: Values | None, noise: Values | None = None) -> int:
        """A result from elsewhere; its token."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything needed to go on, as JSON."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of an optimizer made with the same arguments. Raises ValueError."""
        ...


class Book:
    """Keeps the trials of an optimizer; a subclass says what to propose."""

    kind = ""
    retries = 0
    """How often a failed candidate may be asked again."""
    repeats = False
    """Whether a space that has no more is asked again, those asked least often first; else there are fewer questions."""

    def __init__(self, domain: Domain, goal: Goal, seed: int) -> None:
        self.domain, self.goal, self.seed = domain, goal, seed
        self.trials: list[Trial] = []
        self.rounds = 0
        self.duplicates = 0
        """Proposals of the library that had been asked before and were replaced."""

    # --- to be said by a subclass ---

    def _propose(self, n: int, draw: np.random.Generator) -> list[Flat]:
        """At least up to `n` canonical, feasible candidates; those that are closed are dropped by the caller."""
        raise NotImplementedError

    def _learn(self, trial: Trial) -> None:
        """A trial ended."""

    def _correct(self, trial: Trial) -> None:
        """A trial that ended well has other values now."""

    def _asked(self, trials: Sequence[Trial]) -> None:
        """These proposals became trials."""

    # --- the protocol ---

    def ask(self, n: int) -> list[tuple[int, Flat]]:
        if not isinstance(n, int | np.integer) or n < 1:
            raise ValueError(f"ask({n!r}); expected a whole number of at least 1")
        draw = np.random.default_rng([self.seed, self.rounds])
        self.rounds += 1
        chosen: dict[str, Flat] = {}
        for flat in self._propose(n, draw):
            self._take(flat, chosen, n)
        for _ in range(200 * n):  # a small space, or a library that repeats itself
            if len(chosen) == n:
                break
            self._take(self.domain.random(draw), chosen, n)
        asked = [*chosen.items()]
        if self.repeats and len(asked) < n:
            asked += self._again(chosen, n - len(asked), draw)
        trials = [Trial(len(self.trials) + i, flat, key) for i, (key, flat) in enumerate(asked)]
        self.trials += trials
        self._asked(trials)
        return [(trial.token, dict(trial.config)) for trial in trials]

    def tell(self, token: int, values: Values | None, noise: Values | None = None) -> None:
        if not (isinstance(token, int | np.integer) and 0 <= token < len(self.trials)):
            raise ValueError(f"token {token!r} was never given out; tell tokens that ask() or attach() returned")
        trial = self.trials[token]
        corrects = trial.status == "ok" and values is not None
        if trial.status != "pending" and not corrects:
            raise ValueError(f"token {token} was told already ({trial.status}); each ends once, only values may be corrected")
        trial.values, trial.noise = self._checked(values), None if noise is None else {k: float(v) for k, v in noise.items()}
        trial.status = "failed" if values is None else "ok"
        if corrects:
            self._correct(trial)
        else:
            self._learn(trial)

    def attach(self, config: Flat, values: Values | None, noise: Values | None = None) -> int:
        canonical = self.domain.canonical(config)
        self.trials.append(Trial(len(self.trials), canonical, self.domain.key(canonical)))
        self.tell(len(self.trials) - 1, values, noise)
        return len(self.trials) - 1

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "seed": self.seed, "rounds": self.rounds, "duplicates": self.duplicates,
                "goal": asdict(self.goal), "names": list(self.domain.choices),
                "trials": [asdict(trial) for trial in self.trials]}  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        expected = {"kind": self.kind, "seed": self.seed, "goal": asdict(self.goal), "names": list(self.domain.choices)}
        for name, value in expected.items():
            if state.get(name) != value:
                raise ValueError(f"the state is of another search: its {name} is {state.get(name)!r}, expected {value!r}")
        self.rounds, self.duplicates = int(state["rounds"]), int(state["duplicates"])
        self.trials = [Trial(**item) for item in state["trials"]]

    # --- what subclasses use ---

    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "ok"]

    def closed(self) -> set[str]:
        """Keys not to be asked again: pending, answered, or failed too often."""
        failures: dict[str, int] = {}
        for trial in self.trials:
            if trial.status == "failed":
                failures[trial.key] = failures.get(trial.key, 0) + 1
        return {trial.key for trial in self.trials if trial.status != "failed" or failures[trial.key] > self.retries}

    def _take(self, flat: Flat, chosen: dict[str, Flat], n: int) -> None:
        key = self.domain.key(flat)
        if len(chosen) < n and key not in chosen and key not in self.closed():
            chosen[key] = flat

    def _again(self, chosen: Mapping[str, Flat], count: int, draw: np.random.Generator) -> list[tuple[str, Flat]]:
        known = {**{trial.key: trial.config for trial in self.trials}, **chosen}
        times = Counter(trial.key for trial in self.trials) + Counter(chosen.keys())
        order = sorted(known, key=lambda key: (times[key], draw.random()))
        return [(key, known[key]) for key in itertools.islice(itertools.cycle(order), count)]

    def _checked(self, values: Values | None) -> dict[str, float] | None:
        if values is None:
            return None
        if missing := [name for name in self.goal.metrics if name not in values]:
            raise ValueError(f"the answer lacks {missing[0]}; expected {', '.join(self.goal.metrics)}")
        if wrong := [name for name in self.goal.metrics if not math.isfinite(values[name])]:
            raise ValueError(f"{wrong[0]} is {values[wrong[0]]}; tell None for a failure")
        return {name: float(value) for name, value in values.items()}
