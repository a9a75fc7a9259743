"""The sweep's loop: trials that end well and badly, restarts, workers that die; and the chaos of benchmarks/search_chaos.py."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from benchmarks import search_chaos
from benchmarks.search_chaos import ChaosPlan, Evolution, chaos
from search.farm import Farm
from search.jobs import JobQueue, violations
from search.members import Member, Policy
from search.service import Service
from search.simulated import Faults, Physics, SimulatedDevice
from search.store import Store
from search.workers import Infeasible, ProcessScorer, WorkerLost, answer, checked

POLICY = Policy(retry_s=0.01, half_width=1.0, backoff_s=(0.02,) * 100)


def score(candidate):
    """Imported by the worker process: what a candidate asks for, it does."""
    if candidate.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if candidate.get("wait"):
        time.sleep(60)
    if candidate.get("fail"):
        raise KeyError("bug")
    print("what a training prints is no answer")
    return {"loss": float("inf") if candidate.get("diverge") else candidate["ffn_size"] / 1000}


def quick(candidate):
    return {"loss": 1.0 / candidate["num_layers"]}


def sweep(folder, *, trials=16, scorers=(quick, quick), faults=None, optimizer=None, **options):
    store = Store.open(folder / "s.sqlite", {})
    physics = Physics(outliers=0.0)
    members = [Member(SimulatedDevice(name, real_s=0.0, faults=faults or Faults(), physics=physics)) for name in "ab"]
    farm = Farm(store, members, policy=POLICY)
    return store, Service(store, farm, optimizer or Evolution(), ChaosPlan(folder), trials=trials, scorers=scorers, **options)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_sweep_ends_every_trial_once_and_tells_it(tmp_path, ordered, monkeypatch):
    monkeypatch.setattr(search_chaos, "FFN", (512, 1024, 2048))
    monkeypatch.setattr(search_chaos, "LAYERS", (2, 3, 4, 6, 8))  # 15 candidates for 24 trials
    store, service = sweep(tmp_path, trials=24, faults=Faults(crash=0.2), ordered=ordered)
    with store:
        service.run()
        trials = store.trials()
        assert len(trials) == 24 and not [trial.reason for trial in store.trials("failed", "cancelled")]
        assert {trial.state for trial in trials} == {"ok", "infeasible"}
        assert all(trial.results is None and "status 139" in trial.reason for trial in store.trials("infeasible"))
        assert all(set(trial.results) == {"loss", "ttft_ms_short", "ttft_ms_long"} for trial in store.trials("ok"))
        told = [trial.number for trial in store.told()]
        assert sorted(told) == list(range(24)) and (told == sorted(told) or not ordered)
        assert [values is None for _, values in service.optimizer.told] == [trial.state != "ok" for trial in store.told()]
        duplicates = [trial for trial in trials if trial.duplicate_of is not None]
        assert duplicates and all(trial.results == store.trial(trial.duplicate_of).results for trial in duplicates)
        assert len(service.queue.jobs()) == 3 * (24 - len(duplicates)) and violations(service.queue) == []


def test_a_service_that_stops_anywhere_goes_on_as_if_it_had_not(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "torn").mkdir()
    store, service = sweep(tmp_path / "whole")
    with store:
        service.run()
        whole = [(trial.key, trial.state, trial.results, trial.told) for trial in store.trials()]

    class Stop(Exception):
        pass

    torn, turns = [], 0
    while not torn:
        store, service = sweep(tmp_path / "torn")
        steps = iter(range(1))

        def stop(steps=steps):
            if next(steps, None) is None:
                raise Stop

        with store:
            try:
                service.run(on_step=stop)
                torn = [(trial.key, trial.state, trial.results, trial.told) for trial in store.trials()]
            except Stop:
                turns += 1
            service.farm.stop(10)
    assert torn == whole and turns >= 1


def test_what_cannot_be_built_or_scored_is_infeasible_and_the_rest_of_its_work_is_dropped(tmp_path):
    class Plan(ChaosPlan):
        def measures(self, config):
            if config["ffn_size"] > 3000:
                raise ValueError("ffn_size is no multiple of 32")
            return super().measures(config)

    def diverges(candidate):
        return {"loss": float("nan") if candidate["ffn_size"] > 1500 else 1.0}

    store, service = sweep(tmp_path, scorers=[diverges])
    service.plan = Plan(tmp_path)
    with store:
        service.run()
        for trial in store.trials():
            size = trial.config["candidate"]["ffn_size"]
            words = "cannot be built: ffn_size" if size > 3000 else "training diverged" if size > 1500 else ""
            assert trial.state == ("infeasible" if words else "ok") and words in trial.reason
        assert violations(service.queue) == []


def test_no_candidate_left_is_said(tmp_path):
    class Empty(Evolution):
        def ask(self, n):
            return []

    store, service = sweep(tmp_path, optimizer=Empty())
    with store, pytest.raises(ValueError, match="no candidate left after 0 trials; widen the space"):
        service.run()


def test_a_measurement_done_again_amends_its_trial(tmp_path):
    store, service = sweep(tmp_path, trials=8)
    with store:
        service.run()
        trial = store.told()[0]
        job = next(job for job in service.queue.jobs(trial=trial.number) if job.name.endswith("/long"))
        for member in service.farm.members:
            member.device.drift = 1.5
        again = service.farm.confirm(job.id, "5 sigma from the predictor")
        assert not service.step()
        service.farm.work(service.farm.members[0]) or service.farm.work(service.farm.members[1])
        assert service.queue.job(again).state == "ok" and service.step()
        new = store.trial(trial.number).results
        assert new["ttft_ms_long"] == pytest.approx(1.5 * trial.results["ttft_ms_long"], rel=0.02)
        assert new["ttft_ms_short"] == trial.results["ttft_ms_short"] and len(store.events("amended")) == 1
        assert store.trial(trial.number).told == trial.told


def test_a_worker_that_dies_is_told_and_replaced():
    scorer = ProcessScorer("tests.search.test_service:score")
    assert scorer({"ffn_size": 500}) == {"loss": 0.5}
    with pytest.raises(WorkerLost, match="status -9"):
        scorer({"die": True})
    with pytest.raises(Infeasible, match="loss is inf: training diverged"):
        scorer({"ffn_size": 1, "diverge": True})
    with pytest.raises(RuntimeError, match="KeyError: 'bug'"):
        scorer({"fail": True})
    scorer.timeout_s = 0.3
    with pytest.raises(WorkerLost):
        scorer({"wait": True})
    scorer.close()
    assert answer(lambda config: {"x": 1}, {}) == {"scores": {"x": 1.0}} and checked({"x": 1}) == {"x": 1.0}


def test_what_a_worker_says_is_in_its_log_and_not_on_the_terminal(tmp_path, capfd):
    scorer = ProcessScorer("tests.search.test_service:no_such_function", log=tmp_path / "scores.log")
    for _ in range(2):
        with pytest.raises(WorkerLost, match="before its answer; .*scores.log has what it said"):
            scorer({"ffn_size": 500})
    assert (tmp_path / "scores.log").read_text().count("AttributeError") == 2 and "AttributeError" not in capfd.readouterr().err


def test_a_worker_ends_with_its_service():
    scorer = ProcessScorer("tests.search.test_service:score")
    waiting = threading.Thread(target=lambda: pytest.raises(WorkerLost, scorer, {"wait": True}))
    waiting.start()
    while scorer._process is None or scorer._process.stdin is None:
        time.sleep(0.01)
    time.sleep(0.2)
    scorer._process.stdin.close()  # as when the service is killed: the training does not outlive it
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_scoring_that_fails_three_times_fails_its_trial_alone(tmp_path):
    def sometimes(candidate):
        if candidate["num_layers"] % 2:
            raise WorkerLost("preempted")
        return {"loss": 1.0}

    store, service = sweep(tmp_path, trials=8, scorers=[sometimes])
    with store:
        service.run()
        for trial in store.trials():
            odd = trial.config["candidate"]["num_layers"] % 2
            assert trial.state == ("failed" if odd else "ok") and ("preempted (attempt 3 of 3)" in trial.reason) == bool(odd)


def test_kill_9_of_service_agents_and_workers_changes_nothing(tmp_path):
    found = chaos(tmp_path, trials=24, kills=5, seed=3, limit_s=100)
    assert found["wrong"] == [] and sum(found["states"].values()) == 24 and sum(found["kills"].values()) >= 4
    with Store.read(tmp_path / "wild" / "search.sqlite") as store:
        assert all(job.ended for job in JobQueue(store).jobs()) and store.events("put_back")


def test_kill_9_in_the_whole_search_changes_nothing(tmp_path):
    """Latency stage, staged optimizer, both budgets, confirmation: the same trials, front and second values."""
    found = chaos(tmp_path, trials=16, kills=4, seed=1, limit_s=110, loop="sweep")
    assert found["wrong"] == [] and sum(found["states"].values()) == 16 and sum(found["kills"].values()) >= 3
    assert found["front"] and found["confirmed"] and found["jobs"] > 24 + 2 * 16
    with Store.read(tmp_path / "wild" / "search.sqlite") as store:
        assert store.phase == "done" and store.events("latency_model") and store.events("put_back")


def test_the_comparison_sees_a_difference():
    calm = {"trials": [[0, "a", "ok", {"x": 1.0}]], "told": [0], "violations": [], "open": 0, "front": [0], "phase": "done"}
    assert search_chaos.compare(calm, calm) == []
    for change in ({"trials": [[0, "a", "ok", {"x": 1.1}]]}, {"trials": []}, {"told": [1]}, {"open": 1}, {"violations": ["x"]},
                   {"front": []}, {"phase": "confirm"}):  # fmt: skip
        assert search_chaos.compare(calm, {**calm, **change})
