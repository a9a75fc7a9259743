"""Predictions against measurements: what is compared, and when there is an alarm."""

from __future__ import annotations

import pytest

from search.alarms import check_predictions, raise_alarms
from search.store import Store

BOTH = ("ttft_ms", "decode_ms")


@pytest.fixture
def store(tmp_path):
    """Four trials: 5 % too low, 30 % too high, its duplicate, one that failed; and one that nobody predicted."""
    with Store.open(tmp_path / "sweep.db", {}) as store:
        for key, predicted in (("a", 95.0), ("b", 130.0), ("c", 50.0)):
            store.event("predicted", key=key, ttft_ms=predicted, deviation=1.0)
        store.add_trials([(key, {}) for key in ("a", "b", "b", "c", "d")])
        for number in (0, 1, 2, 4):
            store.finish_trial(number, "ok", {"loss": 2.0, "ttft_ms": 100.0})
        store.finish_trial(3, "failed", reason="lost")
        yield store


def test_each_architecture_that_was_predicted_and_measured_is_compared_once(store):
    assert [(miss.trial, pytest.approx(miss.off)) for miss in check_predictions(store, "ttft_ms")] == [(0, -0.05), (1, 0.3)]
    assert check_predictions(store, "decode_ms") == []


def test_more_than_ten_percent_is_an_alarm_and_one_only(store, caplog):
    assert [(metric, miss.trial) for metric, miss in raise_alarms(store, BOTH)] == [("ttft_ms", 1)]
    assert raise_alarms(store, BOTH) == []
    (event,) = store.events("mispredicted")
    assert event.trial == 1
    assert event.detail == {"metric": "ttft_ms", "predicted": 130.0, "measured": 100.0, "off": 130 / 100 - 1}
    assert [record.getMessage() for record in caplog.records] == [
        "trial 1: ttft_ms was predicted as 130 and measured as 100 (+30 %); the model learns of it"]  # fmt: skip


def test_the_first_prediction_counts(store):
    store.event("predicted", key="b", ttft_ms=101.0, deviation=1.0)
    assert check_predictions(store, "ttft_ms")[1].predicted == 130.0
