"""The statistics of the ranking benchmark, on losses whose answer is known."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from benchmarks._prune_tables import correlations, jackknife, noise_of, reachable_tau
from search.quality import kendall_tau


def test_noise_is_the_deviation_of_one_run():
    draw = random.Random(0)
    pairs = [(3.0 + draw.gauss(0, 0.02), 3.0 + draw.gauss(0, 0.02)) for _ in range(4000)]
    assert noise_of(pairs) == pytest.approx(0.02, rel=0.05)
    assert noise_of([(3.0, 3.2)]) == pytest.approx(0.2 / math.sqrt(2))


def test_noise_bounds_tau_as_a_simulation_of_the_whole_does():
    draw, spread, noise = random.Random(1), 0.1, 0.05
    true = [draw.gauss(3.3, spread) for _ in range(20)]
    taus, bounds = [], []
    for _ in range(30):
        measured = [loss + draw.gauss(0, noise) for loss in true]
        taus.append(kendall_tau(true, measured))
        bounds.append(reachable_tau(measured, noise, draws=50))
    assert statistics.mean(bounds) == pytest.approx(statistics.mean(taus), abs=0.05)
    assert reachable_tau(true, 0.0, draws=2) == 1.0
    assert reachable_tau(true, 10.0) == 0.0, "losses that are all noise say nothing"


def test_the_standard_error_of_tau_is_none_of_a_perfect_order_and_shrinks_with_candidates():
    assert jackknife([1, 2, 3, 4], [2, 3, 5, 9]) == 0
    draw = random.Random(2)

    def error(count: int) -> float:
        one = [draw.random() for _ in range(count)]
        return jackknife(one, [value + draw.gauss(0, 0.3) for value in one])

    assert statistics.mean(error(80) for _ in range(5)) < 0.7 * statistics.mean(error(20) for _ in range(20))


def test_disagreement_is_told_by_the_property_that_makes_it():
    draw = random.Random(3)
    shapes = [{"blocks": float(draw.randint(2, 5)), "heads": float(draw.choice((2, 4))), "same": 1.0} for _ in range(200)]
    scratch = [3 + 0.1 * draw.random() for _ in shapes]
    short = [1 + 2 * loss + 0.05 * item["blocks"] for loss, item in zip(scratch, shapes, strict=True)]
    found = correlations(short, scratch, shapes)
    assert found["blocks"] > 0.95 and abs(found["heads"]) < 0.2 and "same" not in found
