"""Two budgets: when the short one is enough, what is then said of a trial, and that a kill changes none of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from search.budgets import Relation, TwoBudgets, answer_of
from search.front import front
from search.optim.base import Domain, Goal
from search.optim.hypervolume import hypervolume
from search.optim.staged import Settings, Staged
from search.quality import SyntheticScorer
from search.store import Store
from tests.search.test_replay import replayed
from tests.search.test_sweep_loop import PLAN, SPACE, Killed, sweep_in, told

REFERENCES = {"loss": 4.0, "ttft_ms": 50.0}
SHORT_PLAN = replace(PLAN, trials=24, short_tokens=100_000, least_pairs=8)


def test_a_line_and_the_spread_of_a_new_point():
    draw = random.Random(0)
    pairs = [(x := draw.uniform(2, 3), 0.4 + 0.8 * x + draw.gauss(0, 0.02)) for _ in range(400)]
    line = Relation.fit(pairs[:200])
    off = [(full - line.predict(short)[0]) / line.predict(short)[1] for short, full in pairs[200:]]
    assert line.slope == pytest.approx(0.8, abs=0.02) and line.spread == pytest.approx(0.02, rel=0.15)
    assert 0.9 < sum(abs(x) < 1.96 for x in off) / 200 < 0.99
    few = Relation.fit(pairs[:6])
    assert few.predict(9.0)[1] > 5 * few.predict(2.5)[1], "far from all that is known nothing is known"
    for wrong in ([], [(1.0, 2.0)] * 5):
        with pytest.raises(ValueError, match="give no line; expected three or more"):
            Relation.fit(wrong)


@pytest.fixture
def store(tmp_path):
    """Twenty told trials: loss 3.0 ... 3.95 by short loss 3.5 ... 4.45, the slower the better; and three that are asked."""
    with Store.open(tmp_path / "s.sqlite", {}) as store:
        for i in range(20):
            store.add_trials([(f"k{i}", {"token": i, "candidate": {"x": i}, "told": 0})])
            noise = 0.01 * (i % 2)
            store.finish_trial(i, "ok", {"loss": 3.0 + 0.05 * i + noise, "short_loss": 3.5 + 0.05 * i, "ttft_ms": 40.0 - i})
            store.tell(i)
        store.add_trials([("a", {"token": 20, "candidate": {"x": 20}, "told": 20}),
                          ("b", {"token": 21, "candidate": {"x": 21}, "told": 19})])  # fmt: skip
        yield store


def test_both_budgets_are_spent_until_the_order_is_known_to_the_question(store):
    budgets = TwoBudgets(store, 100, REFERENCES)
    new, earlier = store.trial(20), store.trial(21)
    assert budgets.scorings(new) == {"short": {"x": 20, "budget_tokens": 100}}
    assert budgets.scorings(earlier) == {"short": {"x": 21, "budget_tokens": 100}, "score": {"x": 21}}, "it knew of 19"
    assert TwoBudgets(store, 100, REFERENCES, bar=1.01).scorings(new).keys() == {"short", "score"}


def test_the_full_training_follows_where_the_front_may_gain(store):
    budgets, trial = TwoBudgets(store, 100, REFERENCES), store.trial(20)
    # At 30 ms the front asks for the loss of trial 10, 3.5, which a short loss of 4.0 comes to.
    found = budgets.judge(trial, {"loss": 4.0}, {"ttft_ms": 30.5})
    assert found.loss == pytest.approx(3.505, abs=0.002) and 0 < found.gain < 1e-3
    better = budgets.judge(trial, {"loss": 3.9}, {"ttft_ms": 30.5})
    assert better.full and better.gain > 3 * found.gain
    line = [(3.0 + 0.05 * i + 0.01 * (i % 2), 40.0 - i) for i in range(20)]
    now = hypervolume(np.array(line), np.array([4.0, 50.0]))
    then = hypervolume(np.array([*line, (better.loss, 30.5)]), np.array([4.0, 50.0]))
    assert better.gain == pytest.approx(then / now - 1, rel=0.1)
    worse = budgets.judge(trial, {"loss": 4.2}, {"ttft_ms": 30.5})
    assert not worse.full and worse.gain < 1e-9
    assert budgets.judge(trial, {"loss": 4.2}, {"ttft_ms": 24.5}).full, "a faster model may have a higher loss"
    assert budgets.judge(trial, {"loss": 3.0}, {"ttft_ms": 51.0}).gain == 0, "too slow for any loss"
    assert not TwoBudgets(store, 100, REFERENCES, {"ttft_ms": 30.0}).judge(trial, {"loss": 3.0}, {"ttft_ms": 31.0}).full
    assert not budgets.judge(trial, {"loss": 4.7}, {"ttft_ms": 1.0}).full, "over the reference"


def test_while_there_is_no_front_the_references_set_the_scale(store):
    tight = TwoBudgets(store, 100, {"loss": 2.0, "ttft_ms": 50.0})
    found = tight.judge(store.trial(20), {"loss": 2.0}, {"ttft_ms": 25.0})
    assert found.gain == pytest.approx((2.0 - found.loss) * 25.0 / 100.0, rel=0.01) and found.full


def test_a_predicted_loss_never_passes_for_a_measured_one(store):
    budgets, trial = TwoBudgets(store, 100, REFERENCES), store.trial(20)
    full = budgets.scores(trial, {"loss": 4.0, "tokens": 100.0}, {"loss": 3.4, "tokens": 900.0})
    assert full == ({"loss": 3.4, "tokens": 900.0, "short_loss": 4.0}, {})
    scores, deviations = budgets.scores(trial, {"loss": 4.0, "tokens": 100.0}, None)
    assert scores.keys() == {"tokens", "short_loss", "predicted_loss"} and deviations["predicted_loss"] > 0.003
    store.finish_trial(20, "ok", {**scores, "ttft_ms": 1.0}, deviations)
    assert 20 not in {trial.number for trial in front(store.trials("ok"), REFERENCES)}, "the fastest of all, but not trained"
    results, noise = answer_of(store.trial(20).results, store.trial(20).noise)
    assert results["loss"] == scores["predicted_loss"] and noise["loss"] == deviations["predicted_loss"]
    assert answer_of({"loss": 1.0}, {}) == ({"loss": 1.0}, {}) and answer_of(None, {}) == (None, {})


def spread(space, plan, predict):
    """Proposes what is spread over the space, so that many a candidate is worth no full training."""
    domain = Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible)
    settings = Settings(initial=16, pool=150, generations=2, draws=16)
    known = {"ttft_ms": partial(predict, "ttft_ms")}
    return Staged(domain, Goal(objectives=plan.references), plan.seed, known=known, settings=settings)


def short_sweep(folder, **changes):
    sweep, store, farm = sweep_in(folder, plan=SHORT_PLAN, scorer=SyntheticScorer(noise=0.002), **changes)
    sweep.make_optimizer = spread
    return sweep, store, farm


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    sweep, store, farm = short_sweep(tmp_path_factory.mktemp("short"))
    return sweep.run(), store, farm


def test_a_sweep_with_two_budgets_saves_full_trainings_and_says_which(whole):
    found, store, farm = whole
    trials = store.trials()
    short = [trial for trial in trials if "loss" not in trial.results]
    judged = {event.trial: event.detail for event in store.events("judged")}
    assert 3 <= len(short) < 16 and all(trial.number >= 8 for trial in short)
    assert {number for number, detail in judged.items() if not detail["full"]} == {trial.number for trial in short}
    names = {job.name for job in farm.queue.jobs(kind="score")}
    for trial in trials:
        assert f"trial/{trial.number}/short" in names
        assert (f"trial/{trial.number}/score" in names) == ("loss" in trial.results)
        assert trial.results.keys() >= {"short_loss", "ttft_ms"} and ("predicted_loss" in trial.noise) == (trial in short)
    assert not {trial.number for trial in found} & {trial.number for trial in short}
    known = {item["token"]: item for item in json.loads(store.snapshot())["trials"]}
    for trial in short:
        item = known[trial.config["token"]]
        assert item["values"]["loss"] == trial.results["predicted_loss"] and item["noise"]["loss"] > 0
    truth = SyntheticScorer.true_loss
    for trial in short:
        real = truth(SPACE.to_config(SPACE.unflatten(trial.config["candidate"])), 1_000_000)
        assert abs(trial.results["predicted_loss"] - real) < 5 * trial.noise["predicted_loss"]


def test_it_is_replayed_as_any_other(whole):
    found = replayed(whole[1], SHORT_PLAN, spread)
    assert found.difference is None and found.answers == SHORT_PLAN.trials


@pytest.mark.parametrize("kills", [(11,), (9, 14, 18)])
def test_killed_and_started_again_it_decides_the_same(tmp_path, whole, kills):
    for kill in (*kills, None):

        opened = []

        def tick(kill=kill, opened=opened):
            if kill is not None and len(opened[0].told()) >= kill and opened[0].trials("running"):
                raise Killed

        sweep, store, farm = short_sweep(tmp_path, tick=tick)
        opened.append(store)
        if kill is None:
            sweep.run()
            break
        with pytest.raises(Killed):
            sweep.run()
        farm.stop(10)
        store.close()
    assert told(store) == told(whole[1])
    assert [t.results for t in store.trials()] == [t.results for t in whole[1].trials()]
    assert sorted(e.trial for e in store.events("judged")) == sorted(e.trial for e in whole[1].events("judged"))
