"""The loop of a search over a simulated device and a synthetic loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from modeling.identity import config_key
from search.farm import Farm
from search.front import front
from search.jobs import violations
from search.members import Member, Policy, payload_request
from search.metrics import Point, parse_metric
from search.optim.base import Domain, Goal
from search.optim.staged import Settings, Staged
from search.quality import SyntheticScorer, as_score
from search.readings import LatencyPlan, Readings
from search.simulated import Faults, Physics, SimulatedDevice, write_shape
from search.space import Space
from search.store import Store
from search.sweep import Sweep, SweepError, SweepPlan, build_once

SPACE = Space.from_dict({
    "num_layers": [4, 6, 8], "hidden_size": [128, 192, 256], "ffn_size": [256, 512, 768], "num_heads": [4],
    "num_kv_heads": [2, 4],
    "fixed": {"vocab_size": 2048, "max_positions": 512, "window": 64},
})  # fmt: skip
PLAN = SweepPlan(trials=14, ordered=True, references={"loss": 4.0, "ttft_ms": 60.0}, batch=4, confirm=3, seed=3)
LATENCY = LatencyPlan(prompt_tokens=128, decode_tokens=4, readings=20, more=4, max_readings=24, timeout_s=0.2)
QUICK = Policy(warmup=3, min_repeats=3, max_repeats=6, retry_s=0.0, reconnect_s=0.0, cool_s=0.0, backoff_s=(0.0, 0.0, 0.0))


def make_staged(space, plan, predict):
    domain = Domain(choices=space.flat_choices(), repair=space.repair, feasible=space.feasible)
    settings = Settings(initial=6, pool=150, generations=2, draws=16)
    known = {name: partial(predict, name) for name in plan.device_limits()}
    return Staged(domain, Goal(objectives=plan.references, limits=plan.limits), plan.seed, known=known, settings=settings)


def sweep_in(folder, *, faults=None, scorer=None, plan=PLAN, tick=lambda: None, seed=1, latency=LATENCY,
             expect=lambda request: None):  # fmt: skip
    """(sweep, store, farm); the store is open."""
    store = Store.open(folder / "sweep.db", {"space": SPACE.to_dict(), "seed": plan.seed})
    device = SimulatedDevice(seed=seed, physics=Physics(noise=0.01), faults=faults or Faults(), real_s=0.0)
    farm = Farm(store, [Member(device)], policy=QUICK)
    farm.queue.recover()
    build = build_once(folder / "shapes", write_shape, config_key)
    readings = Readings(farm, SPACE, latency, build, tick=tick, expect=expect)
    score = as_score(scorer or SyntheticScorer(noise=0.002), lambda flat: SPACE.to_config(SPACE.unflatten(flat)), 1_000_000, 0)
    return Sweep(store, SPACE, plan, readings, [score, score], make_staged, tick), store, farm


def run(folder, **changes):
    sweep, store, farm = sweep_in(folder, **changes)
    return sweep.run(), store, farm


def told(store):
    return [(trial.key, trial.state, trial.results and trial.results.get("loss"), trial.told) for trial in store.trials()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(front, store, farm) of an undisturbed sweep."""
    return run(tmp_path_factory.mktemp("whole"))


def test_a_sweep_finds_a_front_of_measured_models(whole):
    found, store, farm = whole
    trials = store.trials()
    assert store.phase == "done" and len(trials) == PLAN.trials and {trial.state for trial in trials} == {"ok"}
    assert not violations(farm.queue)
    best = front(trials, PLAN.references, PLAN.bounds())
    assert found and [trial.number for trial in found] == [trial.number for trial in best]
    losses, times = zip(*((t.results["loss"], t.results["ttft_ms"]) for t in found), strict=True)
    assert list(losses) == sorted(losses) and list(times) == sorted(times, reverse=True)
    for trial in trials:
        loss, time = trial.results["loss"], trial.results["ttft_ms"]
        as_good = [t for t in trials if t.results["loss"] <= loss and t.results["ttft_ms"] <= time]
        assert (as_good == [trial]) == (trial.number in {t.number for t in found})
    again = store.events("confirmed")
    assert len(again) == min(PLAN.confirm, len(found))
    for event in again:
        first, second = event.detail["losses"]
        assert 0 < abs(first - second) < 0.02, "another seed, the same model"
        assert event.detail["ttft_ms"][1] == pytest.approx(event.detail["ttft_ms"][0], rel=0.05)
    assert sorted(trial.told for trial in trials) == list(range(PLAN.trials))


def test_predictions_are_made_before_measurements_and_come_near_them(whole):
    _, store, _ = whole
    predicted = {event.detail["key"]: event.detail["ttft_ms"] for event in store.events("predicted")}
    for trial in store.trials():
        assert 0 < abs(trial.results["ttft_ms"] / predicted[trial.key] - 1) < 0.15


def test_a_prediction_that_is_far_off_is_an_alarm_as_soon_as_it_was_measured(tmp_path, whole):
    assert not whole[1].events("mispredicted")
    sweep, store, _ = sweep_in(tmp_path)
    right = sweep.forecast.predict
    sweep.forecast.predict = lambda metric, flats: tuple(1.3 * part for part in right(metric, flats))
    sweep.run()
    alarms = [(event.trial, event.detail["off"]) for event in store.events("mispredicted")]
    assert sorted(number for number, _ in alarms) == [trial.number for trial in store.trials()]
    assert all(0.1 < off < 0.5 for _, off in alarms)
    told = [event.kind for event in store.events() if event.kind in ("predicted", "mispredicted")]
    assert "predicted" in told[told.index("mispredicted") :], "during the search, not after it"


def test_each_fit_of_the_latency_model_is_one_event_with_what_a_page_shows(whole):
    _, store, _ = whole
    events = store.events("latency_model")
    assert len(events) == len({(event.detail["metric"], event.detail["bought"]) for event in events}) >= 2
    for event in events:
        assert len(event.detail["held_out"]) == event.detail["report"]["readings"]
        off = [abs(predicted / measured - 1) for measured, predicted in event.detail["held_out"]]
        assert 100 * sum(off) / len(off) == pytest.approx(event.detail["report"]["mape"], rel=0.01)
        assert set(event.detail["proxies"]) == {"parameters", "flops"}


def test_failures_end_trials_and_never_become_numbers(tmp_path):
    scorer = SyntheticScorer(infeasible_share=0.3)
    _, store, farm = run(tmp_path, scorer=scorer, faults=Faults(timeout=0.05, nonsense=0.03))
    ended = store.trials("infeasible", "failed")
    assert ended and all(trial.results is None and trial.reason for trial in ended)
    assert all(trial.told is not None for trial in store.trials()) and not violations(farm.queue)


class Killed(BaseException):
    """Stands for a kill: nothing of ours catches it."""


@pytest.mark.parametrize("phase, trials", [("latency", 0), ("pareto", 5), ("confirm", PLAN.trials)])
def test_killed_and_started_again_it_is_the_sweep_that_was_not(tmp_path, whole, phase, trials):
    def tick():
        if store.phase == phase and len(store.told()) >= trials:
            raise Killed

    sweep, store, farm = sweep_in(tmp_path, tick=tick)
    with pytest.raises(Killed):
        sweep.run()
    farm.stop(10)
    store.close()
    found, store, farm = run(tmp_path)
    assert told(store) == told(whole[1]) and [trial.key for trial in found] == [trial.key for trial in whole[0]]
    assert len(store.events("confirmed")) == len(whole[1].events("confirmed")) and not violations(farm.queue)


def test_a_limit_below_the_fastest_candidate_is_refused_in_words(tmp_path):
    plan = SweepPlan(trials=4, references={"loss": 8.0, "ttft_ms": 1e-6})
    with pytest.raises(SweepError, match="best of .* measured candidates has ttft_ms .* the limit is 1e-06; raise the limit"):
        run(tmp_path, plan=plan)


def test_three_objectives_and_a_limit_at_another_prompt_length(tmp_path):
    latency = replace(LATENCY, also=(Point(256, 2),))
    bounds = {"loss": 4.0, "ttft_ms": 60.0, "decode_ms": 5.0}
    plan = replace(PLAN, references=bounds, limits={"ttft_ms@256x2": 40.0}, trials=10)
    found, store, _ = run(tmp_path, plan=plan, latency=latency)
    names = {f"{name}{at}" for name in ("ttft_ms", "decode_ms", "peak_memory_mib") for at in ("", "@256x2")}
    trials = store.trials()
    for trial in trials:
        assert names <= trial.results.keys()
        assert trial.results["ttft_ms@256x2"] > 1.05 * trial.results["ttft_ms"] / 2, "twice the prompt on twice the threads"
    assert found and {t.number for t in found} < {t.number for t in trials}
    assert all(trial.results["ttft_ms@256x2"] <= 40.0 for trial in found)
    assert {event.detail["metric"] for event in store.events("latency_model")} == names
    predicted = {event.trial: event.detail for event in store.events("predicted")}
    for trial in trials:
        said = predicted[trial.number]
        assert said["deviations"].keys() == {"ttft_ms", "decode_ms", "ttft_ms@256x2"}
        for name in said["deviations"]:
            assert said[name] == pytest.approx(trial.results[name], rel=0.15), "a model of each number at each point"


def test_a_metric_that_is_not_measured_is_refused(tmp_path):
    with pytest.raises(SweepError, match="ttft_ms@999x1 is wanted and not measured; measured are ttft_ms, decode_ms"):
        run(tmp_path, plan=replace(PLAN, limits={"ttft_ms@999x1": 1.0}))


@pytest.mark.parametrize("name", ["ttft", "ttft_ms@", "ttft_ms@12", "ttft_ms@0x1", "decode_ms@12x1x1", "loss"])
def test_names_of_metrics_are_checked(name):
    with pytest.raises(ValueError, match="expected"):
        parse_metric(name, Point(128))


def test_a_metric_is_read_in_its_unit():
    values = {"ttft_ms": 12.0, "decode_tok_s": 50.0, "peak_memory_bytes": 3 * 2.0**20}
    errors, times = {"ttft_ms": 0.1, "decode_tok_s": 0.5}, ("ttft_ms", "decode_tok_s")
    read = [parse_metric(name, Point(128)).read(values, errors, times) for name in ("ttft_ms", "decode_ms", "peak_memory_mib")]
    assert read == [(12.0, 0.1), (20.0, pytest.approx(0.2)), (3.0, 0.0)]
    assert parse_metric("ttft_ms", Point(128)).read({}, {}, times) is None
    assert parse_metric("ttft_ms@128x1", Point(128)).name == "ttft_ms", "its own point has no suffix"


def test_a_device_that_is_fast_and_wrong_brings_no_numbers(tmp_path):
    def right(request):
        return SimulatedDevice().measure(request)["logits_crc32c"]

    found, store, farm = run(tmp_path, faults=Faults(wrong_output=0.3), expect=right, plan=replace(PLAN, trials=8))
    ended = store.trials("failed")
    assert ended and all("computed something else" in trial.reason and trial.results is None for trial in ended)
    assert store.events("bad_output") and not violations(farm.queue)
    truth = SimulatedDevice()
    for trial in store.trials("ok"):
        first, _ = truth.truth(farm_request(farm, trial.number))
        assert trial.results["ttft_ms"] == pytest.approx(1e3 * first, rel=0.1), "not the half of it"


def farm_request(farm, trial):
    return payload_request(next(job for job in farm.queue.jobs("ok", kind="measure") if job.trial == trial).payload)
