"""A sweep's optimizer asks the same again, given the answers of its database: in order, out of order, corrected, grown."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from search.budgets import answer_of
from search.jobs import JobQueue
from search.quality import SyntheticScorer
from search.readings import KnownReadings
from search.replay import _ranges, replay
from search.simulated import Faults
from tests.search.test_sweep_loop import LATENCY, PLAN, QUICK, SPACE, Killed, make_staged, sweep_in


def replayed(store, plan=PLAN, optimizer=make_staged):
    readings = KnownReadings(JobQueue(store), SPACE, LATENCY, QUICK.times)


    def make(planned, predict):
        return optimizer(SPACE, replace(plan, trials=planned), predict)

    return replay(store, readings, plan.device_limits(), make, answer_of)


class Slow(SyntheticScorer):
    """Every third answer is overtaken by others."""

    calls = itertools.count()

    def score(self, candidate, budget_tokens, seed):
        time.sleep(1.0 if next(self.calls) % 3 == 0 else 0.0)
        return super().score(candidate, budget_tokens, seed)


@pytest.fixture(scope="module")
def ordered(tmp_path_factory):
    sweep, store, _ = sweep_in(tmp_path_factory.mktemp("ordered"), scorer=SyntheticScorer(noise=0.002, infeasible_share=0.2))
    sweep.run()
    return store


def test_an_ordered_sweep_asks_the_same_again(ordered):
    found = replayed(ordered)
    assert found.difference is None and (found.trials, found.answers) == (PLAN.trials, PLAN.trials)
    assert found.questions == len(ordered.events("asked")) == 4 and ordered.trials("infeasible")


def test_it_does_not_matter_whether_a_training_diverges_before_or_after_the_measurement(ordered, tmp_path):
    class Late(SyntheticScorer):
        def score(self, candidate, budget_tokens, seed):
            found = super().score(candidate, budget_tokens, seed)
            time.sleep(0.5 if found.status == "infeasible" else 0.0)
            return found

    class Early(SyntheticScorer):
        """Diverges at once, on a slow device: the measurements of those that diverge are cancelled."""

    asked = []
    for kind in (Late, Early):
        opened = []

        def tick(kind=kind, opened=opened):
            store, farm = opened
            farm.members[0].device.real_s = 0.3 if kind is Early and store.phase == "pareto" else 0.0

        (tmp_path / kind.__name__).mkdir()
        sweep, store, farm = sweep_in(tmp_path / kind.__name__, scorer=kind(noise=0.002, infeasible_share=0.2), tick=tick)
        opened += [store, farm]
        sweep.run()
        asked.append([event.detail for event in store.events("asked")])
        assert [trial.key for trial in store.trials()] == [trial.key for trial in ordered.trials()]
        measured = {job.trial for job in farm.queue.jobs("ok", kind="measure") if job.trial is not None}
        late = {trial.number for trial in store.trials("infeasible")}
        assert late and (late <= measured) == (kind is Late)
    assert asked[0] == asked[1] == [event.detail for event in ordered.events("asked")]


def test_the_first_difference_is_named(ordered):
    changed = next(event for event in ordered.events("told") if event.detail["results"])
    with ordered.transaction() as sql:
        wrong = {**changed.detail, "results": {**changed.detail["results"], "loss": 9.0}}
        sql.execute("SAVEPOINT before")
        sql.execute("UPDATE events SET detail = ? WHERE kind = 'told' AND trial = ?", (json.dumps(wrong), changed.trial))
        found = replayed(ordered)
        sql.execute("ROLLBACK TO before")
    first = found.difference
    assert first is not None and first.trial >= 6 and first.asked == ordered.trial(first.trial).key != first.replayed
    assert str(first) == f"trial {first.trial}: asked {first.asked}, replayed {first.replayed}"
    assert found.trials == first.trial and replayed(ordered).difference is None


def test_another_seed_is_another_search(ordered):
    assert replayed(ordered, replace(PLAN, seed=4)).difference.trial == 0


def test_a_database_without_the_record_is_refused(ordered):
    with ordered.transaction() as sql:
        sql.execute("SAVEPOINT before")
        sql.execute("DELETE FROM events WHERE kind = 'asked' AND id = (SELECT max(id) FROM events WHERE kind = 'asked')")
        with pytest.raises(ValueError, match="says of 12 of its 14 trials how they were asked for"):
            replayed(ordered)
        sql.execute("ROLLBACK TO before")


def test_an_asynchronous_sweep_that_was_killed_corrected_and_grown_asks_the_same_again(tmp_path):
    """Answers in another order, a restart in the middle, one trial measured again, and more trials than were planned."""
    plan = replace(PLAN, ordered=False, batch=3, trials=10)
    confirmed = []

    def tick():
        told = store.told()
        if len(told) >= 6 and not killed:
            raise Killed
        if killed and len(told) >= 8 and not confirmed:
            trial = next(trial for trial in told if trial.state == "ok")
            job = next(job for job in farm.queue.jobs(trial=trial.number) if job.kind == "measure")
            farm.members[0].device.drift = 1.2
            confirmed.append((trial, farm.confirm(job.id, "4 sigma off")))

    killed = []
    sweep, store, farm = sweep_in(tmp_path, plan=plan, tick=tick, scorer=Slow(noise=0.002), faults=Faults(crash=0.1))
    with pytest.raises(Killed):
        sweep.run()
    farm.stop(10)
    store.close()
    killed.append(True)
    plan = replace(plan, trials=14)
    sweep, store, farm = sweep_in(tmp_path, plan=plan, tick=tick, scorer=Slow(noise=0.002), faults=Faults(crash=0.1))
    sweep.run()
    trial, again = confirmed[0]
    assert farm.queue.job(again).state == "ok"
    assert store.trial(trial.number).results["ttft_ms"] == pytest.approx(1.2 * trial.results["ttft_ms"], rel=0.03)
    assert [event.trial for event in store.events("told")].count(trial.number) == 2
    assert {event.detail["planned"] for event in store.events("asked")} == {10, 14}
    assert [t.number for t in store.told()] != list(range(14)), "the answers came in order: nothing was shown"
    found = replayed(store, plan)
    assert found.difference is None and (found.trials, found.answers) == (14, 15)


def test_numbers_are_kept_as_ranges():
    for numbers in ([], [3], [1, 2, 3], [1, 3, 4, 9], [5, 4, 3]):
        assert [n for first, last in _ranges(numbers) for n in range(first, last + 1)] == numbers
