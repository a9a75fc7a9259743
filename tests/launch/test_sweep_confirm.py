"""A front that was measured twice: its intervals, and what is dropped from it."""

from __future__ import annotations

import random

import pytest

from launch.sweep_collect import from_store
from launch.sweep_confirm import Confirmation, Sample, confirm, intervals
from launch.sweep_data import FrontPoint, Limit
from launch.sweep_report import render_sweep
from modeling.config import ModelConfig
from search.store import Store
from tests.helpers.page import Page
from tests.helpers.sweep_records import FOUR_SECONDS, LOSS, TTFT

MODEL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=192)


def test_two_numbers_with_their_errors_are_weighted_by_them():
    (low, high) = intervals({0: Sample((100.0, 103.0), (3.0, 6.0))})[0]
    mean, error = (100 / 9 + 103 / 36) / (1 / 9 + 1 / 36), (1 / 9 + 1 / 36) ** -0.5
    assert (low, high) == (pytest.approx(mean - 1.96 * error), pytest.approx(mean + 1.96 * error))


def test_numbers_that_differ_by_more_than_their_errors_widen_the_interval():
    still, jump = Sample((100.0, 100.0), (1.0, 1.0)), Sample((200.0, 210.0), (1.0, 1.0))
    alone = intervals({0: still})[0]
    one = intervals({0: still, 1: jump, 2: still})
    assert one[1][0] < 200 and one[1][1] > 210, "both lie within"
    assert one[0] == alone, "one that went wrong says nothing of the others"
    most = intervals({0: still, 1: jump, 2: jump})
    assert most[0][1] - most[0][0] > 4 * (alone[1] - alone[0]), "where most could not be repeated, nor could this one"


def test_without_errors_the_differences_of_all_are_the_measure():
    losses = {0: Sample((2.00, 2.02), (0.0, 0.0)), 1: Sample((2.50, 2.49), (0.0, 0.0)), 2: Sample((3.0,), (0.0,))}
    found = intervals(losses)
    assert found[0][0] < 2.0 and found[0][1] > 2.02
    assert found[2][0] < 3.0 < found[2][1] and found[2][1] - found[2][0] > found[1][1] - found[1][0], "one number is less sure"
    assert intervals({2: losses[2]}) == {}, "one number without error says nothing of itself"


@pytest.mark.parametrize("known", [True, False])
def test_intervals_hold_the_truth_nineteen_times_in_twenty(known):
    draw, inside, number = random.Random(0), 0, 0
    for _ in range(400):
        truth = {point: draw.uniform(90.0, 110.0) for point in range(6)}
        samples = {point: Sample((draw.gauss(value, 2.0), draw.gauss(value, 2.0)), (2.0, 2.0) if known else (0.0, 0.0))
                   for point, value in truth.items()}  # fmt: skip
        for point, (low, high) in intervals(samples).items():
            inside, number = inside + (low <= truth[point] <= high), number + 1
    assert 0.94 < inside / number < 0.99, inside / number


def point(number, ttft, loss, half=(10.0, 0.01)):
    ends = {"ttft_ms": (ttft - half[0], ttft + half[0]), "loss": (loss - half[1], loss + half[1])}
    return FrontPoint(trial=number), Confirmation(again={"ttft_ms": ttft, "loss": loss}, intervals=ends)


def confirmed(*points, limits=(FOUR_SECONDS,)):
    found = {item.trial: seen for item, seen in points if seen}
    kept, gone = confirm([item for item, _ in points], found, (LOSS, TTFT), limits)
    return [item.trial for item in kept], {item.trial: item.reason for item in gone}


def test_a_point_is_dropped_where_another_is_better_at_its_worst():
    kept, gone = confirmed(point(0, 1000, 2.5), point(1, 900, 2.4), point(2, 800, 2.6))
    assert kept == [1, 2] and gone == {0: "trial 1 is better in everything, also at the worse ends of its interval"}


def test_intervals_that_touch_and_points_that_are_equal_stay():
    assert confirmed(point(0, 1000, 2.5), point(1, 985, 2.4)) == ([0, 1], {})
    assert confirmed(point(0, 1000, 2.5, half=(0, 0)), point(1, 1000, 2.5, half=(0, 0))) == ([0, 1], {})


def test_a_point_whose_whole_interval_is_over_the_limit_is_dropped():
    kept, gone = confirmed(point(0, 4020, 2.3), point(1, 4005, 2.4))
    assert kept == [1] and gone == {0: "confirmed time to first token is 4.01 to 4.03 s, wanted time to first token ≤ 4 s"}


def test_what_was_not_confirmed_neither_drops_nor_is_dropped():
    unsure = (FrontPoint(trial=3, intervals={"ttft_ms": (1.0, 2.0), "loss": (0.1, 0.2)}), None)
    half = (FrontPoint(trial=4), Confirmation(again={"loss": 2.0}, intervals={"loss": (1.9, 2.1)}, reason="hot"))
    assert confirmed(point(0, 1000, 2.5), unsure, half, (FrontPoint(trial=5), None)) == ([0, 3, 4, 5], {})
    slow = Limit(name="ttft_ms", unit="ms", value=0.5)
    assert confirmed(unsure, limits=(slow,)) == ([3], {})


def again(store, number, values, errors, second_loss):
    """A second measurement and scoring as the search leaves them."""
    trial = store.trial(number)
    store.event("confirmed", trial=number, losses=[trial.results["loss"], second_loss], reason="", errors=errors,
                ttft_ms=[trial.results["ttft_ms"], values["ttft_ms"]])  # fmt: skip


def test_the_database_gives_confirmed_intervals_and_the_page_names_what_is_dropped(tmp_path):
    with Store.open(tmp_path / "sweep.db", {}) as store:
        store.add_trials([(key, {}) for key in "abc"])
        for number, (loss, ttft) in enumerate(((2.40, 2000.0), (2.42, 1900.0), (2.6, 1000.0))):
            store.finish_trial(number, "ok", {"loss": loss, "ttft_ms": ttft}, {"ttft_ms": 5.0})
        again(store, 0, {"ttft_ms": 2004.0}, {"ttft_ms": 5.0}, 2.401)
        again(store, 1, {"ttft_ms": 2300.0}, {"ttft_ms": 5.0}, 2.56)  # fast by chance, and good by chance
        again(store, 2, {"ttft_ms": 1001.0}, {"ttft_ms": 5.0}, 2.602)
        found = from_store(store, name="demo", objectives=(LOSS, TTFT), limits=(FOUR_SECONDS,), to_model=lambda flat: MODEL)
    low, high = found.front[0].intervals["ttft_ms"]
    assert (low, high) == (pytest.approx(2002 - 1.96 * 5 / 2**0.5), pytest.approx(2002 + 1.96 * 5 / 2**0.5))
    assert [item.trial for item in found.front] == [0, 1, 2] and not found.dropped, "its two losses make it unsure"
    with Store.open(tmp_path / "sure.db", {}) as store:
        store.add_trials([(key, {}) for key in "abc"])
        for number, (loss, ttft) in enumerate(((2.40, 2000.0), (2.43, 1999.0), (2.6, 1000.0))):
            store.finish_trial(number, "ok", {"loss": loss, "ttft_ms": ttft}, {"ttft_ms": 5.0})
        for number, (ttft, loss) in enumerate(((1990.0, 2.401), (2021.0, 2.431), (1001.0, 2.602))):
            again(store, number, {"ttft_ms": ttft}, {"ttft_ms": 0.5}, loss)
        found = from_store(store, name="demo", objectives=(LOSS, TTFT), limits=(FOUR_SECONDS,), to_model=lambda flat: MODEL)
    assert [item.trial for item in found.front] == [0, 2] and [item.trial for item in found.dropped] == [1]
    page = Page(render_sweep(found))
    assert "Dropped: what they had in the search was not confirmed" in page.text
    assert "trial 0 is better in everything" in page.text and "1 dropped by it" in page.text
