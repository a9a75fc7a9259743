"""Which trials are on a front."""

from __future__ import annotations

from search.front import front, knee
from search.records import Trial


def trial(number, **results):
    return Trial(number=number, key=str(number), config={}, state="ok", results=results or None, noise={}, reason="",
                 duplicate_of=None, told=None)  # fmt: skip


TRIALS = [trial(0, loss=3.0, ttft_ms=10.0), trial(1, loss=2.0, ttft_ms=20.0), trial(2, loss=2.5, ttft_ms=25.0),
          trial(3, loss=1.0, ttft_ms=40.0), trial(4, predicted_loss=0.5, ttft_ms=5.0), trial(5)]  # fmt: skip


def numbers(*arguments):
    return [found.number for found in front(*arguments)]


def test_the_undominated_that_have_every_objective_and_keep_every_limit():
    assert numbers(TRIALS, ["loss", "ttft_ms"]) == [3, 1, 0]
    assert numbers(TRIALS, ["loss", "ttft_ms"], {"ttft_ms": 30.0}) == [1, 0]
    assert numbers(TRIALS, ["loss", "ttft_ms"], {"peak_memory_mib": 9.0}) == [], "what was not measured keeps no limit"
    assert numbers(TRIALS, ["ttft_ms"]) == [4] and numbers([], ["loss"]) == []


def test_the_knee_gives_up_least_in_all_together():
    assert [found.number for found in knee(front(TRIALS, ["loss", "ttft_ms"]), ["loss", "ttft_ms"])][0] == 1
