"""What names and values of a domain say; problems drawn at random; trials of values that were hardly tried."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pytest

pytest.importorskip("botorch")

from benchmarks._flash_like import REFERENCE  # noqa: E402
from benchmarks._flash_random import random_problem  # noqa: E402
from benchmarks.search_front import find_problem  # noqa: E402
from search.optim.base import Domain  # noqa: E402
from search.optim.encode import Encoder  # noqa: E402
from search.optim.pool import Pool  # noqa: E402
from search.optim.probes import VISITS, choose_probes  # noqa: E402

KINDS = ["full", "window", "skip"]


def roles(sizes: dict[str, list[Any]], slots: str = "s{}", **options: Any) -> dict[str, str]:
    names = [slots.format(i) for i in range(6)]
    encoder = Encoder(Domain(choices={**sizes, **dict.fromkeys(names, KINDS)}, **options))
    return {role: encoder.names[column] for role, column in encoder._roles.items()}


def test_slots_wherever_their_number_stands() -> None:
    for name in ("attention.{}", "layer_{}_attention", "z[{}]", "block{}.kind2", "{}"):
        encoder = Encoder(Domain(choices={"w": [1, 2], **{name.format(i): KINDS for i in (10, 9, 11, 1)}}))
        assert [[encoder.names[column] for column in group] for group in encoder.slot_groups] == [
            [name.format(i) for i in (1, 9, 10, 11)]]  # fmt: skip
    assert Encoder(Domain(choices={"x0": [1, 2], "x1": [1, 3], "x2": [1, 4]})).slot_groups == []
    in_a_row = Encoder(Domain(choices={"n": [1, 2], **dict.fromkeys("pqrs", KINDS), "t": ["u", "v"]}))
    assert in_a_row.slot_groups == [[1, 2, 3, 4]]


def test_roles_by_name_else_by_value() -> None:
    values = ([3, 4, 5, 6], [64, 128], [128, 256, 512], [4, 8], [1, 2])
    by_name = {"layers": "n_layers", "hidden": "d_model", "ffn": "d_ff", "heads": "n_heads", "kv": "kv_heads"}
    assert roles(dict(zip(by_name.values(), values, strict=True))) == by_name
    unnamed = {"layers": "a", "hidden": "b", "ffn": "c", "heads": "d", "kv": "e"}
    assert roles(dict(zip("abcde", values, strict=True))) == unnamed
    llama = {"hidden_dim": values[2], "dim": values[1], "n_layers": values[0], "n_heads": values[3], "n_kv_heads": values[4]}
    assert roles(llama) == {"layers": "n_layers", "hidden": "dim", "ffn": "hidden_dim", "heads": "n_heads", "kv": "n_kv_heads"}
    assert roles({"a": [1, 5], "b": [64, 128], "c": [1, 2], "d": [3, 4], "e": [5, 9]}) == {}  # nothing idles slots


def test_an_ffn_width_may_be_a_multiple() -> None:
    slots = {f"s{i}": KINDS for i in range(4)}
    sizes = {"layers": [3, 4], "width": [64, 128], "heads": [4, 8], "kv": [1, 2]}
    wide = Encoder(Domain(choices={**sizes, "ffn": [256, 512], **slots}))
    ratio = Encoder(Domain(choices={**sizes, "ffn_ratio": [2, 4], **slots}))
    flat = {"layers": 3, "width": 128, "heads": 4, "kv": 1, **dict.fromkeys(slots, "full")}
    first, second = wide.encode([{**flat, "ffn": 512}]), ratio.encode([{**flat, "ffn_ratio": 4}])
    numbers = [encoder._model_size(codes, encoder._numbers(codes), np.array([[3.0, 0.0, 0.0]]))
               for encoder, codes in ((wide, first), (ratio, second))]  # fmt: skip
    np.testing.assert_allclose(*numbers)


def test_random_problems_are_reproducible_and_their_reference_cuts_the_space() -> None:
    for seed in (0, 3):
        problem = random_problem(seed)
        assert problem == random_problem(seed) != random_problem(seed + 1)
        draw = np.random.default_rng(0)
        flats = [{name: values[draw.integers(len(values))] for name, values in problem.space.items()} for _ in range(300)]
        values = np.array([problem.evaluate(problem.repair(flat)) for flat in flats])
        good = (values < list(REFERENCE.values())).mean(axis=0)
        assert 0.15 < good[0] < 0.85 and 0.05 < good[1] < 0.95
        front = [(float(time), float(loss)) for time, loss in problem.true_front]
        assert len(front) > 20 and problem.share(front) == pytest.approx(1)
    assert find_problem("random3") == random_problem(3)
    with pytest.raises(argparse.ArgumentTypeError, match="is no problem"):
        find_problem("random")


def test_values_beside_the_front_are_tried_until_they_were() -> None:
    """The model is sure that `b` is best small, and the front holds nothing else."""
    encoder = Encoder(Domain(choices={"a": list(range(8)), "b": list(range(8)), "c": ["u", "v"]}))
    pool, reference = Pool(encoder, np.random.default_rng(0)), np.array([10.0, 10.0])

    def score(optimism: float, codes: Any) -> Any:
        loss = 7.5 - codes[:, 0] + codes[:, 1] + codes[:, 2] - 0.1 * optimism
        return np.stack([codes[:, 0] + 1.0, loss], axis=1)

    trials = np.array([[a, 0, 0] for a in range(8)])
    asked = np.repeat(trials, VISITS, axis=0)
    probes = choose_probes(pool, score, trials, asked, set(), reference, 16, lambda codes: None)
    assert sorted(map(tuple, probes[:, 1:])) == [(0, 1), (1, 0)]
    closed = {code.tobytes() for code in probes}
    again = choose_probes(pool, score, trials, asked, closed, reference, 16, lambda codes: None)
    assert len(again) == 2 and not closed & {code.tobytes() for code in again}
    tried = np.vstack([asked, probes, again])
    assert not len(choose_probes(pool, score, trials, tried, closed, reference, 16, lambda codes: None))
    likely = choose_probes(pool, score, trials, asked, set(), reference, 16, lambda codes: np.where(codes[:, 0] > 4, 1, 1e-4))
    assert (likely[:, 0] > 4).all()
    assert not len(choose_probes(pool, score, trials, asked, set(), reference * 0, 16, lambda codes: None))
