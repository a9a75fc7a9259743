"""The face for outside benchmarks: its contract, its count of readings, and quality on a small problem of Flash's kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("botorch")

from benchmarks._flash_like import REFERENCE, SLOTS, VARIANTS  # noqa: E402
from benchmarks.search_front import Noise, run  # noqa: E402
from search.bench_adapter import READINGS, factory  # noqa: E402

PROBLEM = VARIANTS["flash"]


def test_the_true_front_is_undominated_and_reached_by_real_candidates() -> None:
    front = PROBLEM.true_front
    assert (np.diff(front[:, 0]) > 0).all() and (np.diff(front[:, 1]) < 0).all()
    draw = np.random.default_rng(0)
    for _ in range(2000):
        config = PROBLEM.repair({name: values[draw.integers(len(values))] for name, values in PROBLEM.space.items()})
        ttft, loss = PROBLEM.evaluate(config)
        better = front[front[:, 0] <= ttft]
        assert ttft > REFERENCE["ttft"] or not len(better) or better[-1, 1] <= loss + 1e-12


def test_pattern_prices_by_dynamic_programming_are_those_of_enumeration() -> None:
    import itertools

    best: dict[tuple[int, int], float] = {}
    for kinds in itertools.product(range(3), repeat=7):
        at = (kinds.count(0), kinds.count(1))
        best[at] = min(best.get(at, np.inf), PROBLEM.pattern_loss(list(kinds)))
    found = PROBLEM._best_patterns(7)
    assert found.keys() == best.keys()
    assert all(found[at] == pytest.approx(best[at]) for at in best)


def test_contract_of_questions_and_answers() -> None:
    noise = Noise(PROBLEM, 0, 0.0)
    search = factory(PROBLEM.space, REFERENCE, 1, noise.measure_latency, PROBLEM.repair)
    keys: set[Any] = set()
    for n in (1, 5, 2, 8, 3):
        asked = search.ask(n)
        assert len(asked) == n
        for token, config in asked:
            assert set(config) == set(PROBLEM.space) and PROBLEM.repair(config) == config
            keys.add(tuple(config.values()))
            search.tell(token, noise.evaluate(config))
    assert len(keys) == 19 and search.readings == noise.readings <= READINGS
    with pytest.raises(ValueError, match="lacks ttft"):
        factory(PROBLEM.space, {"loss": 1.0}, 0)


def test_same_seed_same_questions_whatever_the_names() -> None:
    renamed = replace(PROBLEM, names=("a", "b", "c", "d", "e", "z[{}]"))
    for problem in (PROBLEM, renamed):
        first, second = (factory(problem.space, REFERENCE, 7, None, problem.repair).ask(4) for _ in range(2))
        assert first == second
        assert all(len(config) == 5 + SLOTS for _, config in first)


def test_finds_most_of_the_front_in_few_evaluations() -> None:
    found = run("staged", PROBLEM, 0, 56, 0.0, True)
    assert found["shares"][50] > 0.8 and found["readings"] <= READINGS
    plain = run("random", PROBLEM, 0, 56, 0.0, False)
    assert plain["shares"][50] < 0.6


def test_readings_that_make_no_sense_are_refused_not_learned() -> None:
    search = factory(PROBLEM.space, REFERENCE, 0, lambda config: float("nan"), PROBLEM.repair)
    with pytest.raises(ValueError, match="usable latency readings"):
        search.ask(1)
