"""The face for outside benchmarks: its contract, its count of readings, and quality on a small problem of Flash's kind."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("botorch")

from benchmarks._flash_like import REFERENCE, SLOTS, VARIANTS  # noqa: E402
from benchmarks.search_front import Noise, run  # noqa: E402
from search.bench_adapter import READINGS, BenchSearch, factory  # noqa: E402

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


SLOTTED = {"depth": [3, 4, 5, 6], "w": [32, 64, 96, 128], **{f"s{i}": ["full", "window", "skip"] for i in range(6)}}
SMALL: dict[str, dict[str, list[Any]]] = {
    "sizes only": {"a": [1, 2, 3, 4], "b": [10, 20, 30], "c": [5, 6, 7, 8]},
    "one name": {"a": list(range(60))},
    "two values each": {f"x{i}": [0, 1] for i in range(7)},
    "text": {"a": ["p", "q", "r"], "b": ["u", "v"], "c": list("abcdefgh")},
    "anything": {"a": [None, 1, 2.5], "b": ["u", 3], "c": [(1, 2), (3, 4)], "d": [[1], [2]], "e": [True, False], "f": [-1, 0]},
    "text in a row": {name: ["x", "y", "z"] for name in "pqrst"},
    "no numbers to compute with": {"a": [1, 2, float("nan")], "b": [1.5, float("inf")], "c": [1, 10**400], "d": [1, 2, 3]},
    "slots with one value": {"depth": [2, 3], **{f"s{i}": ["full"] for i in range(4)}, "z": list(range(40))},
}


def made_up(config: dict[str, Any]) -> dict[str, float]:
    """Some values for anything; the same for the same."""
    digits = [sum(map(ord, str(value))) % 7 for value in config.values()]
    return {"loss": 0.3 + 0.05 * sum(digits) / len(digits), "ttft": 1 + 0.3 * digits[0] + 0.1 * sum(digits) / len(digits)}


def play(
    search: BenchSearch, total: int, batch: int = 8, answer: Callable[[int, dict[str, Any]], Any] = lambda at, c: made_up(c)
) -> list[dict[str, Any]]:
    """Configs in the order in which they were asked; each batch is told backwards."""
    asked: list[dict[str, Any]] = []
    while len(asked) < total:
        batch_asked = search.ask(batch)
        assert len(batch_asked) == batch
        for token, config in reversed(batch_asked):
            search.tell(token, answer(token, config))
        asked += [config for _, config in batch_asked]
    return asked


def distinct(configs: list[dict[str, Any]]) -> int:
    return len({str(sorted(config.items(), key=lambda item: item[0])) for config in configs})


@pytest.mark.parametrize("name", SMALL)
def test_any_space_is_searched_without_repeating_and_over_again_when_there_is_no_more(name: str) -> None:
    space = SMALL[name]
    readings: list[float] = []

    def measure(config: dict[str, Any]) -> float:
        readings.append(made_up(config)["ttft"])
        return readings[-1]

    size = math.prod(len(values) for values in space.values())
    search = factory(space, REFERENCE, 0, measure)
    asked = play(search, 24)
    assert distinct(asked) == 24 and all(list(config) == list(space) for config in asked)
    assert all(config[key] in space[key] for config in asked for key in space)
    assert len(readings) == search.readings <= READINGS
    if size <= 40:
        assert distinct(asked + play(search, 2 * size)) == size


def test_a_space_of_one_candidate() -> None:
    assert play(factory({"a": [1]}, REFERENCE, 0, lambda config: 1.0), 16, batch=4) == [{"a": 1}] * 16


def _new(config: dict[str, Any]) -> dict[str, Any]:
    return {name: "full" if name[0] == "s" and int(name[1:]) >= config["depth"] else value for name, value in config.items()}


def _dropping(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name[0] != "s" or int(name[1:]) < config["depth"]}


def _in_place(config: dict[str, Any]) -> None:
    config.update(_new(config))


def _not_a_config(config: dict[str, Any]) -> Any:
    return list(config)


def _emptying(config: dict[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(config), **_dropping(config), "more": 1}


def _raising(config: dict[str, Any]) -> dict[str, Any]:
    if config["s0"] == "skip":
        raise RuntimeError("no such model")
    return _new(config)


def _changing_sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {**_new(config), "w": min(config["w"], 32 * config["depth"] - 64)}


@pytest.mark.parametrize("repair", [_new, _dropping, _in_place, _emptying, _raising, _changing_sizes, _not_a_config])
def test_whatever_repair_does(repair: Callable[[dict[str, Any]], Any]) -> None:
    asked = play(factory(SLOTTED, REFERENCE, 0, None, repair), 24)
    assert all(list(config) == list(SLOTTED) for config in asked)
    # None of them is the same model as another.
    kept = [repair is _not_a_config or (repair is _raising and config["s0"] == "skip") for config in asked]
    assert distinct([config if same else _new(config) for config, same in zip(asked, kept, strict=True)]) == 24


def test_most_evaluations_fail_and_some_answers_are_no_numbers() -> None:
    space = {**SLOTTED, "w": list(range(16, 129, 8))}

    def answer(at: int, config: dict[str, Any]) -> dict[str, float] | None:
        if at % 9 == 0:
            return {"loss": float("nan"), "ttft": float("inf")}
        size, skips = config["depth"] * config["w"], sum(value == "skip" for value in config.values())
        fits = size < 240 and at >= 20
        return {"loss": 0.2 + 0.2 * (200 / size) ** 0.5 + 0.01 * skips, "ttft": size / 100 - 0.1 * skips} if fits else None

    asked = play(factory(space, REFERENCE, 0, None, _new), 72, answer=answer)
    assert distinct(asked) == 72
    draw = np.random.default_rng(0)
    anything = [{name: values[draw.integers(len(values))] for name, values in space.items()} for _ in range(400)]
    small, usual = ([config["depth"] * config["w"] < 240 for config in configs] for configs in (asked[-40:], anything))
    # What can succeed is learned from what did not.
    assert np.mean(usual) < 0.4 and np.mean(small) > np.mean(usual) + 0.15


@pytest.mark.parametrize(("scale", "reference"), [(1e-3, 0.6), (100.0, 0.6), (100.0, 0.1)])
def test_any_unit_of_loss_and_a_reference_that_nothing_meets(scale: float, reference: float) -> None:
    point = {"loss": reference * scale, "ttft": 4.0 * scale}
    values = SMALL["sizes only"] | {"d": [1, 2, 3, 4]}
    asked = play(factory(values, point, 1), 32, answer=lambda at, c: {k: v * scale for k, v in made_up(c).items()})
    losses = [made_up(config)["loss"] for config in asked]
    everything = [made_up(dict(zip(values, each, strict=True))) for each in itertools.product(*values.values())]
    # Also where nothing is good enough it goes towards what is.
    assert np.mean(losses[16:]) < np.mean([value["loss"] for value in everything])


def test_a_clock_that_fails_now_and_then() -> None:
    draw = np.random.default_rng(0)
    noise = Noise(PROBLEM, 0, 0.0)

    def measure(config: dict[str, Any]) -> Any:
        seconds, kind = noise.measure_latency(config), draw.integers(12)
        if kind == 0:
            raise OSError("device lost")
        return {1: float("nan"), 2: -1.0, 3: None, 4: "slow", 5: float("inf"), 6: 3 * seconds}.get(int(kind), seconds)

    search = factory(PROBLEM.space, REFERENCE, 0, measure, PROBLEM.repair)
    asked = play(search, 24, answer=lambda at, config: noise.evaluate(config))
    assert search.readings == noise.readings <= READINGS
    assert np.mean([PROBLEM.evaluate(config)[0] < REFERENCE["ttft"] for config in asked]) > 0.9


@pytest.mark.parametrize("seconds", [float("nan"), 0.0, 1e-320, None])
def test_a_clock_that_never_works_is_given_up(seconds: float | None, caplog: pytest.LogCaptureFixture) -> None:
    calls = itertools.count()

    def measure(config: dict[str, Any]) -> float:
        if next(calls) >= 0 and seconds is None:
            raise OSError("device lost")
        return float(seconds or 0)

    search = factory(SLOTTED, REFERENCE, 0, measure, _new)
    assert distinct(play(search, 24)) == 24
    assert next(calls) == search.readings <= READINGS
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (2 if seconds is None else 1)


def test_sizes_of_a_thousand_values_are_searched_in_time() -> None:
    space = {name: list(range(1, 1001)) for name in "abc"}
    search = factory(space, REFERENCE, 0, lambda config: (config["a"] + config["b"]) / 400)
    start = time.process_time()
    assert distinct(play(search, 8)) == 8
    # One column for each value of each size: 20 s as long as the columns, not the readings, set the size of a system.
    assert time.process_time() - start < 12


@pytest.mark.parametrize(("change", "words"), [
    ({"space": {1: [1, 2]}}, "name 1; expected text"), ({"space": {"a": 5}}, r"space\['a'\] is 5; expected a list"),
    ({"space": {"a": "full"}}, "is 'full'; expected a list"), ({"space": {"a": {1, 2}}}, "in order"),
    ({"space": {"a": []}}, "no values"), ({"space": [1]}, "expected a mapping"), ({"reference_point": None}, "expected {"),
    ({"reference_point": {"loss": 1.0, "ttft": "4 s"}}, r"\['ttft'\] is '4 s'; expected a number"),
    ({"reference_point": {"loss": math.nan, "ttft": 4.0}}, "is nan; expected a number"), ({"seed": 1.5}, "whole number"),
    ({"seed": None}, "whole number"), ({"measure_latency": 5}, "expected a function"), ({"repair": {}}, "expected a function"),
])  # fmt: skip
def test_arguments_that_are_none_are_named(change: dict[str, Any], words: str) -> None:
    usual: dict[str, Any] = {"space": SLOTTED, "reference_point": REFERENCE, "seed": 0}
    with pytest.raises(ValueError, match=words):
        factory(**{**usual, **change})


def test_numbers_of_numpy_and_answers_of_any_kind() -> None:
    search = factory({"a": np.arange(1, 60)}, REFERENCE, np.int64(3))
    (token, _), *_ = search.ask(np.int64(7))
    search.tell(np.int64(token), {"loss": np.float32(0.5), "ttft": np.array(1.0), "note": "said"})
    for token, loss in enumerate((None, "low", 10**400), 1):
        search.tell(token, {"loss": loss, "ttft": 1.0})
    assert [trial.status for trial in search._search.trials[:5]] == ["ok", "failed", "failed", "failed", "pending"]
    for wrong in ("failed", [0.5, 1.0], False):
        with pytest.raises(ValueError, match="the answer is .*; expected"):
            search.tell(4, wrong)
    assert search._search.trials[4].status == "pending"
    for count in (0, 2.5, "3", None):
        with pytest.raises(ValueError, match="whole number of at least 1"):
            search.ask(count)


def test_questions_one_by_one_and_many_open() -> None:
    search = factory(SLOTTED, REFERENCE, 0, None, _new)
    assert distinct(play(search, 14, batch=1)) == 14
    open_ones = search.ask(16) + search.ask(5)
    assert distinct([config for _, config in open_ones]) == 21
    with pytest.raises(ValueError, match="lacks ttft"):
        search.tell(open_ones[0][0], {"loss": 1.0})
