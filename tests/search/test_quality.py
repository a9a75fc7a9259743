"""Scorers, and the rule for trusting short scores."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from modeling.config import ModelConfig
from modeling.identity import config_key
from search.quality import (
    Quality,
    RankAgreement,
    SyntheticScorer,
    TabulatedScorer,
    TrainedScorer,
    as_score,
    kendall_tau,
)

BASE = ModelConfig(vocab_size=512, hidden_size=64, num_layers=8, num_heads=4, num_kv_heads=2, ffn_size=128, head_dim=16)
CANDIDATES = [replace(BASE, num_layers=n, ffn_size=f) for n in range(4, 9) for f in (64, 96, 128, 160, 192)]


def test_a_key_sees_through_two_spellings_of_one_architecture():
    assert config_key(BASE) == config_key(replace(BASE, attention=("full",) * 8))
    assert config_key(BASE) == config_key(replace(BASE, window=7, init_std=0.3))
    windowed = replace(BASE, attention=("window",) * 8)
    assert len({config_key(c) for c in (BASE, windowed, replace(windowed, window=7), *CANDIDATES)}) == len(CANDIDATES) + 2


def test_a_loss_is_there_exactly_where_it_was_measured():
    for status, loss in (("ok", None), ("ok", math.nan), ("infeasible", 2.0), ("failed", 2.0)):
        with pytest.raises(ValueError, match="exactly where ok"):
            Quality(status=status, loss=loss)
    quality = Quality(status="ok", loss=2.5, tokens=10, seconds=1.5, start_loss=4.0)
    assert Quality.from_dict(quality.to_dict()) == quality
    with pytest.raises(ValueError, match="not the record"):
        Quality.from_dict({"status": "ok", "loss": 1.0, "colour": "red"})


def test_a_table_answers_what_it_holds_and_says_what_it_lacks():
    scorer = TabulatedScorer({(config_key(BASE), 100): 2.0, (config_key(CANDIDATES[0]), 100): math.nan})
    assert scorer.score(BASE, 100, 0).loss == 2.0
    assert scorer.score(CANDIDATES[0], 100, 0).status == "infeasible"
    assert scorer.score(BASE, 200, 0).status == "failed"


def test_a_trained_score_is_what_the_function_returns():
    asked = []

    def train(candidate: ModelConfig, tokens: int, seed: int) -> Quality:
        asked.append((candidate, tokens, seed))
        return Quality(status="ok", loss=3.0, tokens=tokens)

    assert TrainedScorer(train).score(BASE, 64, 5).tokens == 64
    assert asked == [(BASE, 64, 5)]
    with pytest.raises(ValueError, match="budget_tokens=0"):
        TrainedScorer(train).score(BASE, 0, 5)


def test_synthetic_losses_repeat_and_order_as_a_model_does():
    scorer = SyntheticScorer(noise=0.01)
    assert scorer.score(BASE, 10**6, 1) == scorer.score(BASE, 10**6, 1) != scorer.score(BASE, 10**6, 2)
    true = scorer.true_loss
    assert true(BASE, 10**6) > true(BASE, 10**7) > true(replace(BASE, num_layers=16), 10**7)
    pattern = ("full", "skip", "skip", "full", "skip", "skip", "full", "full")
    bunched = ("full", "skip", "skip", "skip", "skip", "full", "full", "full")
    assert true(BASE, 10**6) < true(replace(BASE, attention=pattern), 10**6) < true(replace(BASE, attention=bunched), 10**6)
    broken = [SyntheticScorer(infeasible_share=0.3).score(c, 10**6, seed) for c in CANDIDATES for seed in (0, 1)]
    assert broken[::2] == broken[1::2]
    assert 0 < sum(q.status == "infeasible" for q in broken) < len(broken)
    failed = [SyntheticScorer(failure_share=0.3).score(BASE, 10**6, seed).status for seed in range(30)]
    assert set(failed) == {"ok", "failed"}


def test_kendall_tau_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    for _ in range(20):
        one = [draw.randint(0, 9) for _ in range(15)]
        other = [a + draw.randint(-4, 4) for a in one]
        assert kendall_tau(one, other) == pytest.approx(stats.kendalltau(one, other).statistic)
    assert math.isnan(kendall_tau([1, 1], [1, 2]))


def test_short_scores_are_used_only_when_they_rank_and_on_enough_candidates():
    agreement = RankAgreement()
    assert not agreement.usable and math.isnan(agreement.tau)
    for index, candidate in enumerate(CANDIDATES[:19]):
        agreement.add(candidate, Quality(status="ok", loss=index), Quality(status="ok", loss=index + 5))
    assert agreement.tau == 1 and not agreement.usable, "19 are too few"
    agreement.add(CANDIDATES[19], Quality(status="infeasible"), Quality(status="ok", loss=1.0))
    assert not agreement.usable, "a failure is no pair"
    agreement.add(CANDIDATES[19], Quality(status="ok", loss=30.0), Quality(status="ok", loss=1.0))
    assert agreement.usable and "used: Kendall tau 0.8" in agreement.explain()
    for index, candidate in enumerate(CANDIDATES[:8]):
        agreement.add(candidate, Quality(status="ok", loss=index), Quality(status="ok", loss=-index))
    assert not agreement.usable and "not used" in agreement.explain()


def test_a_candidate_may_name_its_own_budget_and_seed():
    score = as_score(SyntheticScorer(noise=0.01), lambda flat: replace(BASE, num_layers=flat["num_layers"]), 10**6, 0)
    true, noisy = SyntheticScorer.true_loss(BASE, 10**5), score({"num_layers": 8, "budget_tokens": 10**5})
    assert noisy["tokens"] == 10**5 and noisy["loss"] == pytest.approx(true, abs=0.05)
    assert score({"num_layers": 8})["tokens"] == 10**6
    assert score({"num_layers": 8, "seed": 1})["loss"] != score({"num_layers": 8})["loss"]
