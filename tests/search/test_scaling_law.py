"""The law against published numbers, its limits, and laws and runs on disk."""

from __future__ import annotations

import json
from dataclasses import astuple, replace

import numpy as np
import pytest

from search.scaling_files import Run, law_to_dict, read_law, read_runs, runs_text
from search.scaling_law import PUBLISHED, PUBLISHED_CHOICE, Choice, Constants, LawError, effective_experts

TABLE = {
    (0.3, 100): (2.446, 2.409, 2.389, 2.380, 2.376, 2.376),
    (0.3, 500): (2.391, 2.356, 2.345, 2.346, 2.350, 2.355),
    (0.5, 300): (2.360, 2.325, 2.314, 2.314, 2.319, 2.325),
    (0.9, 500): (2.301, 2.270, 2.265, 2.270, 2.279, 2.289),
    (0.5, 6000): (2.301, 2.285, 2.291, 2.301, 2.311, 2.320),
}
"""Loss by (billions of N, of D) for E = 1, 2, 4, 8, 16, 32, worked out from the published constants by someone else."""


@pytest.mark.parametrize("place", TABLE)
def test_published_constants_give_the_published_picture(place):
    found = [float(PUBLISHED.loss(place[0] * 1e9, place[1] * 1e9, experts)) for experts in (1, 2, 4, 8, 16, 32)]
    np.testing.assert_allclose(found, TABLE[place], atol=1.05e-3)  # the last digit of six entries was rounded up


def test_experts_saturate():
    assert effective_experts([1, 8, 32]) == pytest.approx([1, 6.42, 16.0], abs=0.01)


def test_one_expert_is_chinchilla():
    n, d = np.array([0.1, 0.3, 2.0]), np.array([5.0, 100.0, 900.0])
    plain = 0.2388 * n**-0.2833 + 0.6019 * d**-0.3210 + 1.9730
    np.testing.assert_allclose(PUBLISHED.loss(n * 1e9, d * 1e9, 1), plain, rtol=1e-12)


def test_with_experts_each_term_is_what_the_equation_says():
    k, e = PUBLISHED.common.constants, float(effective_experts(4))
    terms = k.A * e**k.delta * 0.5 ** (k.alpha + k.gamma * np.log(e)) + k.B * e**k.omega * 200 ** (k.beta + k.zeta * np.log(e))
    assert float(PUBLISHED.loss(0.5e9, 200e9, 4)) == pytest.approx(terms + k.c, rel=1e-12)


@pytest.mark.parametrize(
    "n, d, e, words",
    [(0.5e9, 6e12, 8, "D = 6000B"), (0.5e9, 50e9, 8, "D = 50B"), (0.2e9, 300e9, 8, "N = 0.2B"), (2e9, 300e9, 8, "N = 2B"),
     (0.5e9, 300e9, 64, "E = 64")],
)  # fmt: skip
def test_outside_of_the_fitted_range_is_flagged_and_has_no_interval(n, d, e, words):
    said = PUBLISHED.predict(n, d, e)
    assert len(said.warnings) == 1 and words in said.warnings[0] and said.low is None and said.high is None


def test_inside_there_is_an_interval_and_no_warning():
    said = PUBLISHED.predict(0.3e9, 500e9, 32, PUBLISHED_CHOICE)
    assert not said.warnings and said.high - said.low == pytest.approx(2 * 1.96 * 0.0076, rel=1e-3)


@pytest.mark.parametrize(
    "n, d, e", [(0, 1e9, 1), (float("nan"), 1e9, 1), (1e9, float("inf"), 1), (1e9, -1, 1), (1e9, 1e9, 0.5)]
)
def test_what_is_no_size_is_refused(n, d, e):
    with pytest.raises(LawError, match="expected a finite number"):
        PUBLISHED.predict(n, d, e)


def test_a_law_survives_its_file(tmp_path):
    part = replace(PUBLISHED.common, draws=(PUBLISHED.common.constants,) * 3, runs=7)
    law = replace(PUBLISHED, common=part, parts={Choice(8, True): part, Choice(4): part}, counts_embedding=False)
    (tmp_path / "law.json").write_text(json.dumps(law_to_dict(law)))
    assert read_law(tmp_path / "law.json") == law


@pytest.mark.parametrize(
    "change, words",
    [(lambda v: v.pop("common"), "common is missing"), (lambda v: v["common"].update(runs="x"), "no scaling law"),
     (lambda v: v["common"]["constants"].update(A=-1), "no scaling law"), (lambda v: v.update(choices={"q": {}}), "g8"),
     (lambda v: v["common"]["constants"].update(c=float("nan")), "no scaling law"),
     (lambda v: v["common"].update(draws=[[1, 2]]), "no scaling law")],
)  # fmt: skip
def test_a_damaged_law_is_named(tmp_path, change, words):
    values = law_to_dict(PUBLISHED)
    change(values)
    (tmp_path / "law.json").write_text(json.dumps(values))
    with pytest.raises(LawError, match=words):
        read_law(tmp_path / "law.json")


def test_runs_survive_their_file_and_folders_are_searched(tmp_path):
    runs = [Run(active=1e6, tokens=1e8, loss=4.0), Run(active=2e6, tokens=1e8, loss=3.9, experts=8, granularity=8, shared=True)]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/runs.jsonl").write_text(runs_text(runs))
    assert read_runs(tmp_path) == runs
    assert [run.choice for run in runs] == [None, Choice(8, True)]


@pytest.mark.parametrize(
    "line, words",
    [("{", "line 1: not JSON"), ("[]", "expected an object"), ('{"active": 1, "tokens": 1}', "loss is missing"),
     ('{"active": 1, "tokens": 1, "loss": NaN}', "loss is nan"), ('{"active": 1, "tokens": 1, "loss": 0}', "loss above 0"),
     ('{"active": "a", "tokens": 1, "loss": 3}', "active is 'a'"), ('{"active": 1, "tokens": 1, "loss": 1e400}', "loss is inf"),
     ('{"active": 1, "tokens": 1, "loss": 3, "experts": 2, "shared": true}', "granularity 1 with a shared expert"),
     ('{"active": 1, "tokens": 1, "loss": 3, "granularity": null}', "granularity is None"), ("", "holds no runs")],
)  # fmt: skip
def test_a_bad_line_of_runs_is_named(tmp_path, line, words):
    (tmp_path / "runs.jsonl").write_text(line + "\n")
    with pytest.raises(LawError, match=words):
        read_runs(tmp_path / "runs.jsonl")


def test_constants_survive_their_vector():
    back = Constants.from_vector(PUBLISHED.common.constants.vector())
    assert astuple(back) == pytest.approx(astuple(PUBLISHED.common.constants), rel=1e-12)
