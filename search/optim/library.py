"""Optimizers of other libraries behind `ask` and `tell`: for comparison, and for goals that need no model.

Their own state is rebuilt by giving them the recorded trials in the recorded order; what they draw is seeded by the round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from search.optim.base import Book, Domain, Flat, Goal, Trial
from search.optim.encode import Encoder
from search.optim.pool import Pool


class Random(Book):
    """Uniform over values, the mixture of kinds in the slots drawn for each candidate."""

    kind = "random"

    def __init__(self, domain: Domain, goal: Goal, seed: int) -> None:
        super().__init__(domain, goal, seed)
        self.encoder = Encoder(domain)

    def _propose(self, n: int, draw: np.random.Generator) -> list[Flat]:
        return [self.encoder.decode(code) for code in Pool(self.encoder, draw).random(4 * n)]


class OptunaBook(Book):
    """Optuna (Akiba et al. 2019): multivariate TPE or NSGA-II, several objectives and limits."""

    def __init__(self, domain: Domain, goal: Goal, seed: int, *, kind: str = "tpe") -> None:
        super().__init__(domain, goal, seed)
        self.kind = kind
        self._study = self._new_study()
        self._open: dict[int, Any] = {}
        self._told: dict[int, list[int]] = {}
        """By token, the numbers of the library's trials that have its values: its own, and what was proposed again."""
        self._proposed: list[Any] = []

    def _new_study(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(directions=["minimize"] * len(self.goal.objectives), sampler=self._sampler(self.seed))

    def _sampler(self, seed: int) -> Any:
        import optuna

        if self.kind == "tpe":
            return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=20)

    def _distributions(self) -> dict[str, Any]:
        import optuna

        # Positions in the lists: an ordered list stays ordered, whatever it holds; text is a category.
        return {name: optuna.distributions.IntDistribution(0, len(values) - 1) if _ordered(values)
                else optuna.distributions.CategoricalDistribution(list(range(len(values))))
                for name, values in self.domain.choices.items()}  # fmt: skip

    def _propose(self, n: int, draw: np.random.Generator) -> list[Flat]:
        self._study.sampler = self._sampler(int(draw.integers(2**31)))
        found: dict[str, tuple[Flat, Any]] = {}
        closed = self.closed()
        for _ in range(6 * n):
            trial = self._study.ask(self._distributions())
            flat = self.domain.canonical({name: self.domain.choices[name][trial.params[name]] for name in self.domain.choices})
            key = self.domain.key(flat)
            if key in closed or key in found or not self.domain.is_feasible(flat):
                self._reject(trial, key)
            else:
                found[key] = (flat, trial)
            if len(found) == n:
                break
        self._proposed = [trial for _, trial in found.values()]
        return [flat for flat, _ in found.values()]

    def _reject(self, trial: Any, key: str) -> None:
        """A duplicate gets the values that are known; what is pending or infeasible fails."""
        self.duplicates += key in self.closed()
        known = next((other for other in self.trials if other.key == key and other.values is not None), None)
        if known is not None:
            self._told.setdefault(known.token, []).append(trial.number)
        self._finish(trial, None if known is None else known.values)

    def _asked(self, trials: Sequence[Trial]) -> None:
        # Where the library ran out of new proposals the book drew some more itself: those have no trial of the library.
        self._open.update({trial.token: theirs for trial, theirs in zip(trials, self._proposed, strict=False)})

    def _learn(self, trial: Trial) -> None:
        theirs = self._open.pop(trial.token, None)
        if theirs is None:
            import optuna

            params = {name: _position(self.domain.choices[name], value) for name, value in trial.config.items()}
            running = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, params=params,
                                                distributions=self._distributions())  # fmt: skip
            theirs = self._add(running)
        self._told.setdefault(trial.token, []).append(theirs.number)
        self._finish(theirs, trial.values)

    def _correct(self, trial: Trial) -> None:
        """The library's trials end once, so the study is made anew, with these trials still to be ended."""
        state, mine = self.state(), self._told[trial.token]
        for number in mine:
            old = state["study"][number]
            kept = {name: value for name, value in old["system"].items() if not name.startswith("constraints:")}
            state["study"][number] = {**old, "state": "RUNNING", "values": None, "system": kept}
        added = self._restore(state)
        for number in mine:
            self._finish(added[number], trial.values)

    def _add(self, frozen: Any) -> Any:
        import optuna

        self._study.add_trial(frozen)
        last = self._study.get_trials(deepcopy=False)[-1]
        return optuna.trial.Trial(self._study, last._trial_id)

    def _finish(self, theirs: Any, values: Mapping[str, float] | None) -> None:
        import optuna

        if values is None:
            self._study.tell(theirs, state=optuna.trial.TrialState.FAIL)
            return
        for name, limit in self.goal.limits.items():
            theirs.set_constraint(name, values[name] - limit)
        self._study.tell(theirs, [values[name] for name in self.goal.objectives])

    def state(self) -> dict[str, Any]:
        trials = [{"state": t.state.name, "params": t.params, "values": t.values, "system": t.system_attrs}
                  for t in self._study.get_trials(deepcopy=False)]  # fmt: skip
        return {**super().state(), "study": trials, "told": {str(token): numbers for token, numbers in self._told.items()},
                "open": {str(token): trial.number for token, trial in self._open.items()}}  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._told = {int(token): list(numbers) for token, numbers in state["told"].items()}
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> list[Any]:
        """The study of a state; its trials."""
        import optuna

        self._study = self._new_study()
        added = [self._add(optuna.trial.create_trial(
            state=optuna.trial.TrialState[item["state"]], params=item["params"], distributions=self._distributions(),
            values=item["values"], system_attrs=item["system"])) for item in state["study"]]
        self._open = {int(token): added[number] for token, number in state["open"].items()}
        return added


class PymooNSGA2(Book):
    """NSGA-II of pymoo (Deb et al. 2002; Blank & Deb 2020): integer SBX and polynomial mutation, constraint domination."""

    kind = "nsga2"
    population = 20

    def _propose(self, n: int, draw: np.random.Generator) -> list[Flat]:
        from pymoo.core.population import Population
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.operators.selection.tournament import TournamentSelection

        ended = [trial for trial in self.trials if trial.status == "ok"]
        if len(ended) < self.population:
            return [self.domain.random(draw) for _ in range(4 * n)]
        problem = self._problem()
        parents = self._survivors(problem, ended)
        state = np.random.default_rng(draw.integers(2**31))
        found: list[Flat] = []
        select = TournamentSelection(func_comp=_tournament)
        for _ in range(6):
            pairs = select(problem, parents, 2 * n, 2, random_state=state)
            children = SBX(prob=0.9, eta=3, vtype=float, repair=RoundingRepair())(problem, pairs, random_state=state)
            children = PM(eta=3, vtype=float, repair=RoundingRepair())(problem, children, random_state=state)
            flats = [self._flat(child) for child in Population.create(*children).get("X")]
            found += [flat for flat in flats if self.domain.is_feasible(flat)]
            if len(found) >= 4 * n:
                break
        closed = self.closed()
        self.duplicates += sum(self.domain.key(flat) in closed for flat in found)
        return found

    def _problem(self) -> Any:
        from pymoo.core.problem import Problem

        top = np.array([len(values) - 1 for values in self.domain.choices.values()])
        return Problem(n_var=len(top), n_obj=len(self.goal.objectives), n_ieq_constr=len(self.goal.limits), xl=0 * top, xu=top)

    def _survivors(self, problem: Any, trials: Sequence[Trial]) -> Any:
        from pymoo.algorithms.moo.nsga2 import RankAndCrowding
        from pymoo.core.population import Population

        rows = [[_position(self.domain.choices[name], trial.config[name]) for name in self.domain.choices] for trial in trials]
        values = [trial.values for trial in trials if trial.values is not None]
        people = Population.new("X", np.array(rows, dtype=float))
        people.set("F", np.array([[value[name] for name in self.goal.objectives] for value in values]))
        limits = [[value[name] - limit for name, limit in self.goal.limits.items()] for value in values]
        people.set("G", np.array(limits).reshape(len(values), -1))
        return RankAndCrowding().do(problem, people, n_survive=self.population, random_state=np.random.default_rng(0))

    def _flat(self, position: Any) -> Flat:
        pairs = zip(self.domain.choices.items(), position, strict=True)
        at = {name: values[int(np.clip(round(place), 0, len(values) - 1))] for (name, values), place in pairs}
        return self.domain.canonical(at)


def _tournament(pop: Any, P: Any, **_: Any) -> Any:
    """The better rank wins, then the emptier neighbourhood; what breaks limits less comes before all."""
    winners = []
    for a, b in P:
        first, second = pop[int(a)], pop[int(b)]
        winners.append(a if _merit(first) <= _merit(second) else b)
    return np.array(winners, dtype=np.intp)[:, None]


def _merit(person: Any) -> tuple[float, int, float]:
    """Rank and crowding are None where a limit is broken."""
    broken = float(np.maximum(person.get("G"), 0).sum())
    rank, crowding = person.get("rank"), person.get("crowding")
    return broken, 0 if rank is None else int(rank), 0.0 if crowding is None else -float(crowding)


def _ordered(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _position(values: Sequence[Any], value: Any) -> int:
    """Idle slots may hold something that is no choice: they count as the first."""
    return list(values).index(value) if value in values else 0
