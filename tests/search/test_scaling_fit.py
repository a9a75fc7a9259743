"""Fits to runs whose law is known: constants, predictions and intervals; Chinchilla; other x; what cannot be fitted."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the search extra is not installed")
pytest.importorskip("threadpoolctl", reason="the search extra is not installed")

from search.scaling_files import Run
from search.scaling_fit import fit, published_prior, weak_prior
from search.scaling_law import PUBLISHED, Choice, Constants, LawError, ScalingLaw

CUT = Choice(8, True)
PAPER = dict(active=(0.3, 0.5, 0.9), tokens=(100, 200, 300, 400, 500), experts=(1, 2, 4, 8, 16, 32))
WIDE = dict(active=(0.03, 0.1, 0.3, 1, 3), tokens=(3, 10, 30, 100, 300, 1000), experts=(1, 2, 4, 8, 16, 32))


def runs_of(law: ScalingLaw, grid: dict, noise: float, seed: int = 0, choice: Choice = CUT) -> list[Run]:
    """Runs of a grid in billions, with noise on the log of the loss."""
    draw = np.random.default_rng(seed)
    return [
        Run(active=n * 1e9, tokens=d * 1e9, experts=e, granularity=choice.granularity if e > 1 else 1,
            shared=choice.shared and e > 1,
            loss=float(law.loss(n * 1e9, d * 1e9, e, choice)) * float(np.exp(draw.normal(0, noise))))
        for e in grid["experts"] for n in grid["active"] for d in grid["tokens"]
    ]  # fmt: skip


def off(found: Constants, truth: Constants) -> np.ndarray:
    return np.abs(np.array(astuple(found)) / np.array(astuple(truth)) - 1)


def test_without_noise_the_constants_come_back_exactly():
    law = fit(runs_of(PUBLISHED, PAPER, 0), bootstraps=0)
    assert off(law.common.constants, PUBLISHED.common.constants).max() < 1e-4 and law.common.rmse < 1e-7


def test_constants_come_back_within_five_percent_from_noisy_runs_over_a_wide_range():
    law = fit(runs_of(PUBLISHED, WIDE, 1e-4, seed=1), bootstraps=0)
    assert off(law.common.constants, PUBLISHED.common.constants).max() < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_predictions_from_runs_as_noisy_as_the_papers(seed):
    """The constants trade off against each other there; what they predict is sure, inside and twice beyond."""
    law = fit(runs_of(PUBLISHED, PAPER, 0.003, seed=seed), bootstraps=0)
    for n, d, e in ((0.4, 150, 2), (0.7, 250, 8), (0.9, 500, 16), (0.3, 100, 1)):
        place = n * 1e9, d * 1e9, e
        assert law.predict(*place, CUT).loss == pytest.approx(float(PUBLISHED.loss(*place)), rel=0.005)
    assert law.predict(1.8e9, 1000e9, 8, CUT).loss == pytest.approx(float(PUBLISHED.loss(1.8e9, 1000e9, 8)), rel=0.05)


def test_a_new_run_lies_inside_of_its_interval_about_as_often_as_it_says():
    hits = []
    for seed in range(3):
        law, draw = fit(runs_of(PUBLISHED, PAPER, 0.003, seed=seed), bootstraps=20), np.random.default_rng(900 + seed)
        for n, d, e in ((0.4, 150, 2), (0.7, 250, 8), (0.9, 500, 16), (0.3, 100, 1)):
            said, truth = law.predict(n * 1e9, d * 1e9, e, CUT), float(PUBLISHED.loss(n * 1e9, d * 1e9, e))
            hits += [said.low <= truth * np.exp(draw.normal(0, 0.003)) <= said.high for _ in range(20)]
    assert 0.88 <= np.mean(hits) <= 0.995


def test_intervals_of_constants_hold_them():
    law = fit(runs_of(PUBLISHED, PAPER, 0.001, seed=2), bootstraps=30)
    truth = dict(zip(law.common.intervals(), astuple(PUBLISHED.common.constants), strict=True))
    inside = [low <= truth[name] <= high for name, (low, high) in law.common.intervals().items()]
    assert sum(inside) >= 7 and law.common.noise == pytest.approx(0.001, rel=0.25)


def test_dense_runs_alone_are_chinchillas_law():
    law = fit(runs_of(PUBLISHED, {**WIDE, "experts": (1,)}, 0), bootstraps=0)
    k = law.common.constants
    assert (k.delta, k.gamma, k.omega, k.zeta) == (0, 0, 0, 0) and law.common.experts == (1, 1)
    assert [k.A, k.alpha, k.B, k.beta, k.c] == pytest.approx([0.2388, -0.2833, 0.6019, -0.3210, 1.9730], rel=1e-3)
    assert any("E = 8" in warning for warning in law.warnings(1e9, 100e9, 8))


def test_other_ways_to_cut_experts_get_constants_of_their_own_with_a_common_floor():
    better = replace(PUBLISHED.common, constants=replace(PUBLISHED.common.constants, A=0.20))
    truth = replace(PUBLISHED, parts={Choice(4): better})
    some = {**PAPER, "experts": (8,)}
    runs = runs_of(truth, PAPER, 0.0005) + runs_of(truth, some, 0.0005, seed=1, choice=Choice(4))
    law = fit(runs, bootstraps=0)
    assert set(law.parts) == {CUT, Choice(4)} and law.parts[CUT] is law.common
    assert law.parts[Choice(4)].constants.c == pytest.approx(law.common.constants.c, rel=0.02)
    for n, d in ((0.3, 200), (0.9, 400)):
        for cut in (CUT, Choice(4)):
            place = n * 1e9, d * 1e9, 8, cut
            assert float(law.loss(*place)) == pytest.approx(float(truth.loss(*place)), rel=2e-3)


def test_a_prior_fills_what_few_runs_leave_open_and_yields_to_many():
    few = runs_of(PUBLISHED, {"active": (0.3, 0.9), "tokens": (200,), "experts": (1, 8)}, 0)
    with pytest.raises(LawError, match="4 runs are too few for 9 constants; expected at least 10, or give a prior"):
        fit(few)
    prior = published_prior(PUBLISHED.common.constants)
    assert off(fit(few, prior=prior, bootstraps=0).common.constants, PUBLISHED.common.constants).max() < 0.01
    wrong = published_prior(replace(PUBLISHED.common.constants, alpha=-0.4, c=1.5))
    many = fit(runs_of(PUBLISHED, PAPER, 0.0005), prior=wrong, bootstraps=0)
    assert float(many.loss(0.5e9, 300e9, 8)) == pytest.approx(float(PUBLISHED.loss(0.5e9, 300e9, 8)), rel=1e-3)
    one_size = runs_of(PUBLISHED, {"active": (0.5,), "tokens": (200, 300, 400, 500), "experts": (1,)}, 0)
    pulled = fit(one_size, prior=wrong, bootstraps=0)
    assert pulled.common.constants.alpha == pytest.approx(-0.4, abs=0.1), "one size says nothing of its exponent"


@pytest.mark.parametrize(
    "grid, words",
    [({"active": (0.5,), "tokens": (100, 200, 300), "experts": (1, 8, 16, 32)}, "exponents of active parameters open"),
     ({"active": (0.3, 0.5, 0.9), "tokens": (100,), "experts": (1, 8, 16, 32)}, "exponents of tokens open"),
     ({"active": (0.3, 0.5), "tokens": (100, 200), "experts": (1,)}, "4 runs are too few for 5 constants")],
)  # fmt: skip
def test_runs_that_leave_constants_open_are_refused(grid, words):
    with pytest.raises(LawError, match=words):
        fit(runs_of(PUBLISHED, grid, 0.001), bootstraps=0)


def test_a_fit_is_the_same_again():
    runs = runs_of(PUBLISHED, {**PAPER, "experts": (1,)}, 0.002)
    first = fit(runs, bootstraps=3)
    assert fit(runs, bootstraps=3) == first and fit(runs, bootstraps=3, seed=1).common.draws != first.common.draws


def test_sizes_without_embedding_must_be_recorded():
    with pytest.raises(LawError, match="no active_without_embedding"):
        fit(runs_of(PUBLISHED, PAPER, 0), with_embedding=False)


def test_a_weak_prior_keeps_a_few_tiny_runs_from_running_away():
    """Two sizes leave the floor open; without a prior draws of the bootstrap say anything."""
    grid = {"active": (2e-4, 1e-3), "tokens": (1e-4, 2e-4, 4e-4), "experts": (1, 4)}
    truth = replace(PUBLISHED, common=replace(PUBLISHED.common, constants=Constants(0.5, 0, -0.2, 0, 0.2, -0.1, -0.3, 0, 1.5)))
    runs = runs_of(truth, grid, 0.005)
    law = fit(runs, prior=weak_prior(runs), bootstraps=20)
    said = law.predict(1e6, 2e5, 4, CUT)
    assert said.low < float(truth.loss(1e6, 2e5, 4)) < said.high < 1.2 * said.low
    assert all(abs(end) < 50 for ends in law.common.intervals().values() for end in ends)
