"""The farm's rules, each with the failure that it is for. Simulated devices on a clock that tests move: hours pass at once."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from modeling.config import ModelConfig
from search.agent.measuring import Gate
from search.devices import DeviceCrash, DeviceError, DeviceTimeout, MeasureRequest
from search.farm import Farm
from search.jobs import violations
from search.members import Clock, Member, Policy
from search.simulated import Faults, Physics, SimulatedDevice, write_shape
from search.statistics import half_width, median, outliers, standard_error
from search.store import Store

BASE = ModelConfig(vocab_size=1000, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=256, head_dim=32)


class FakeClock(Clock):
    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class Fleet:
    """A farm of simulated devices, and files of architectures."""

    def __init__(self, folder) -> None:
        self.folder, self.clock = folder, FakeClock()
        self.store = Store.open(folder / "s.sqlite", {}, self.clock.now)
        self.count = 0

    def device(self, name="a", physics=None, **options):
        return SimulatedDevice(name, clock=self.clock, physics=physics or Physics(outliers=0.0), **options)

    def farm(self, *devices, sentinel=False, policy=None, classes=("",), **options):
        members = [Member(device, classes[i % len(classes)]) for i, device in enumerate(devices)]
        model = self.request(64) if sentinel else None
        return Farm(self.store, members, clock=self.clock, policy=policy or Policy(), sentinel=model, **options)

    def request(self, ffn=256, **changes):
        path = write_shape(replace(BASE, ffn_size=ffn), self.folder / f"ffn-{ffn}.json")
        return MeasureRequest(model=path, prompt_tokens=64, decode_tokens=8, timeout_s=100.0, **changes)

    def submit(self, farm, number=1, **options):
        self.count += number
        return [farm.submit(f"job-{i}", self.request(64 + i), **options) for i in range(self.count - number, self.count)]


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.store.close()


def play(farm, rounds=200):
    """Let every device work until all jobs have ended, the clock moving on where none can."""
    for _ in range(rounds):
        if not farm.queue.jobs("waiting", "running"):
            break
        if not any([farm.work(member) for member in farm.members]):
            farm.clock.sleep(5.0)
    assert violations(farm.queue) == []


def job(farm, number):
    return farm.queue.job(number)


def reported_errors(fleet, gate, number):
    """Shares by which the reported medians are off on two devices of the bar's kind."""
    busy = 9 * sum(fleet.device().truth(fleet.request(120))) * 8
    physics = Physics(heat_c_per_s=10.0 / busy, throttle_c=45.0, cooling_s=30.0)
    devices = [fleet.device(name, physics, seed=seed) for seed, name in enumerate("ab")]
    farm = fleet.farm(*devices, sentinel=gate.max_c is not None, policy=Policy(gate=gate))
    jobs = fleet.submit(farm, number)
    play(farm, 2000)
    off = []
    for place, number in enumerate(jobs):
        done = farm.queue.newest(number)
        assert done.state == "ok", done.reason
        first, step = devices[0].truth(fleet.request(64 + place))
        off += [abs(done.results["ttft_ms"] / 1e3 / first - 1), abs(1 / done.results["decode_tok_s"] / step - 1)]
    return off


def test_reported_medians_are_within_3_percent_of_the_truth_on_a_bad_device(fleet):
    """The bar: 2 % noise, 3 % outliers, warm-up x1.8 for 3 runs, throttling x1.4 above a temperature."""
    off = reported_errors(fleet, Gate(max_c=35.0, throttle_c=44.0), 100)
    assert max(off) < 0.03 and median(off) < 0.01 and not fleet.store.events("drift")


def test_without_the_gate_they_are_not(fleet):
    assert max(reported_errors(fleet, Gate(), 20)) > 0.3


def test_raw_samples_fidelity_and_the_ratio_to_the_sentinel_are_kept(fleet):
    farm = fleet.farm(fleet.device(), sentinel=True)
    (number,) = fleet.submit(farm)
    play(farm)
    (reading,) = farm.queue.readings(number)
    repeats = [sample for batch in reading.samples for sample in batch]
    timed = [sample["ttft_ms"] for sample in repeats if not sample["warmup"]]
    assert reading.role == "result" and reading.fidelity == "analytic" and reading.device == "a"
    assert len(timed) >= 5 and sum(sample["warmup"] for sample in reading.samples[0]) == 4
    assert reading.values["ttft_ms"] == pytest.approx(median(timed)) and 0 < reading.errors["ttft_ms"] < 0.05 * median(timed)
    sentinel = fleet.store.devices()[0].sentinel
    assert reading.sentinel_ratio == pytest.approx(reading.values["ttft_ms"] / sentinel) and reading.output_hash
    assert min(sample["ttft_ms"] for sample in repeats[:3]) > 1.5 * median(timed), "warm-up is kept, and not counted"


def test_drift_is_flagged_jobs_since_the_last_good_sentinel_are_measured_again(fleet):
    device = fleet.device(physics=Physics(outliers=0.0, noise=0.002))
    farm = fleet.farm(device, sentinel=True)
    before = fleet.submit(farm, 20)
    play(farm)
    after = fleet.submit(farm, 10)  # the sentinel comes first, and is good
    farm.work(farm.members[0])
    device.drift = 1.2
    for _ in range(4):
        farm.work(farm.members[0])
    wrong = farm.queue.job(after[3]).results["ttft_ms"]
    fleet.clock.sleep(1900.0)  # half an hour: the sentinel is due
    cool = farm.health.pause
    farm.health.pause = lambda seconds: (cool(seconds), setattr(device, "drift", 1.0))
    play(farm)
    (event,) = fleet.store.events("drift")
    assert event.detail["off"] == pytest.approx(0.2, abs=0.02) and event.detail["measured_again"] == 5
    again = farm.queue.newest(after[3])
    assert again.id != after[3] and again.results["ttft_ms"] == pytest.approx(wrong / 1.2, rel=0.03)
    assert [reading.role for reading in farm.queue.readings(after[3])] == ["drifted"]
    assert farm.queue.newest(before[0]).id == before[0] and not fleet.store.events("quarantined")


def test_a_sentinel_off_twice_is_a_quarantine_of_1_5_and_25_minutes_and_then_the_end(fleet):
    device = fleet.device(physics=Physics(outliers=0.0, noise=0.0))
    farm = fleet.farm(device, sentinel=True)
    fleet.submit(farm)
    play(farm)
    device.drift = 1.2
    fleet.clock.sleep(1900.0)
    fleet.submit(farm, 2)
    play(farm, 2000)
    assert [event.detail["seconds"] for event in fleet.store.events("quarantined")] == [60.0, 300.0, 1500.0]
    assert "sentinel was off twice, by +20.0 %" in fleet.store.events("retired")[0].detail["reason"]
    assert {found.state for found in farm.queue.jobs()} == {"ok", "failed"}
    assert "no device of its class is left" in farm.queue.jobs("failed")[0].reason
    device.drift = 1.0
    again = fleet.farm(device, sentinel=True)  # a new start is a new chance
    (late,) = fleet.submit(again)
    play(again)
    assert job(again, late).state == "ok" and fleet.store.events("healthy_again")


class Scripted(SimulatedDevice):
    """Does what its script says at each measurement: an exception, or None to measure."""

    def __init__(self, name, fleet, *script) -> None:
        super().__init__(name, clock=fleet.clock, physics=Physics(outliers=0.0, noise=0.001))
        self.script, self.here = list(script), True

    def alive(self):
        return self.here

    def measure(self, request):
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        return super().measure(request) if step is None else step(super().measure(request))


def test_a_timeout_is_tried_elsewhere_once(fleet):
    slow, other = Scripted("a", fleet, DeviceTimeout("slow")), Scripted("b", fleet)
    farm = fleet.farm(slow, other)
    (number,) = fleet.submit(farm)
    assert farm.work(farm.members[0]) and not farm.work(farm.members[0]), "there is another device for it"
    play(farm)
    assert job(farm, number).state == "ok" and farm.queue.readings(number)[0].device == "b" and job(farm, number).attempts == 1
    farm.members[1].device.script = [DeviceTimeout("slow")]
    slow.script = [DeviceTimeout("slow")]
    (hopeless,) = fleet.submit(farm)
    play(farm)
    assert job(farm, hopeless).state == "infeasible" and "the second time" in job(farm, hopeless).reason


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [(DeviceCrash("status 139", 139), "infeasible", "crashed"), (DeviceCrash("killed", -9), "infeasible", "oom"),
     (ValueError("context of 160"), "infeasible", "context of 160")],
)  # fmt: skip
def test_a_crash_is_not_tried_again(fleet, error, state, words):
    device = Scripted("a", fleet, error)
    farm = fleet.farm(device)
    (number,) = fleet.submit(farm)
    play(farm)
    assert job(farm, number).state == state and words in job(farm, number).reason and job(farm, number).results is None
    assert device.calls == 0 and farm.queue.readings(number) == []


def test_fast_and_wrong_does_not_win(fleet):
    device = fleet.device(faults=Faults(wrong_output=1.0))
    farm = fleet.farm(device)
    right = fleet.device("r").measure(fleet.request(64))["logits_crc32c"]
    (number,) = fleet.submit(farm, expect=right)
    play(farm)
    assert job(farm, number).state == "failed" and "computed something else" in job(farm, number).reason
    assert farm.queue.readings(number) == [] and fleet.store.events("bad_output")[0].detail["samples"], "kept, as no result"


def test_a_lost_device_is_called_again_and_a_job_has_three_attempts(fleet):
    device = Scripted("a", fleet, DeviceError("usb"))
    farm = fleet.farm(device)
    (number,) = fleet.submit(farm)
    play(farm)
    assert job(farm, number).state == "ok" and job(farm, number).attempts == 1 and not fleet.store.events("quarantined")
    device.script = [DeviceError("usb"), None, DeviceError("usb"), DeviceError("usb")]
    (fine, unlucky) = fleet.submit(farm, 2)
    play(farm, 2000)
    assert job(farm, fine).state == "ok" and job(farm, unlucky).state == "ok"
    devices = [Scripted(name, fleet, *[DeviceError("usb")] * 9) for name in "bcd"]
    farm = fleet.farm(*devices)
    (doomed,) = fleet.submit(farm)
    play(farm)
    assert job(farm, doomed).state == "failed" and "attempt 3 of 3" in job(farm, doomed).reason
    farm = fleet.farm(*[Scripted(name, fleet, DeviceError("usb")) for name in "ef"])
    (everywhere,) = fleet.submit(farm)
    play(farm)
    assert job(farm, everywhere).state == "ok", "one that failed on every device is not left waiting for a better one"


def test_three_failures_in_a_row_are_a_quarantine_by_name(fleet):
    device = Scripted("a", fleet, *[DeviceCrash("status 139", 139)] * 3)
    farm = fleet.farm(device)
    fleet.submit(farm, 4)
    for _ in range(3):
        farm.work(farm.members[0])
    (event,) = fleet.store.events("quarantined")
    assert event.device == "a" and "3 failures in a row" in event.detail["reason"] and event.detail["seconds"] == 60.0
    assert not farm.work(farm.members[0])
    fleet.clock.sleep(61.0)
    play(farm)
    assert [found.state for found in farm.queue.jobs()] == ["infeasible"] * 3 + ["ok"]


def test_models_that_crash_do_not_cost_a_good_device(fleet):
    class Crashes(SimulatedDevice):
        good = "ffn-64.json"  # the sentinel, which is the first job too

        def measure(self, request):
            if request.model.name != self.good:
                raise DeviceCrash("killed", -9)
            return super().measure(request)

    device = Crashes("a", clock=fleet.clock, physics=Physics(outliers=0.0, noise=0.001))
    farm = fleet.farm(device, sentinel=True)
    fleet.submit(farm, 13)
    play(farm)
    states = [found.state for found in farm.queue.jobs()]
    assert states == ["ok"] + ["infeasible"] * 12 and not fleet.store.events("quarantined")
    assert len(fleet.store.events("sentinel")) == 4, "at first, and after every third but the last"
    device.good = ""
    fleet.submit(farm, 3)
    play(farm)
    assert "its sentinel failed, oom" in fleet.store.events("quarantined")[0].detail["reason"]


def test_a_device_that_is_gone_is_quarantined_and_comes_back(fleet):
    device = Scripted("a", fleet, DeviceError("usb"))
    device.here = False
    farm = fleet.farm(device)
    (number,) = fleet.submit(farm)
    farm.work(farm.members[0])
    assert "cannot be reached" in fleet.store.events("quarantined")[0].detail["reason"]
    fleet.clock.sleep(61.0)
    assert not farm.work(farm.members[0]) and fleet.store.events("quarantined")[1].detail["seconds"] == 300.0
    device.here = True
    fleet.clock.sleep(301.0)
    play(farm)
    assert job(farm, number).state == "ok"


def contended(found):
    return {**found, "prefill_cpu_seconds": 0.5 * min(found["samples"]["prefill_seconds"])}


def test_a_contended_measurement_is_never_used_and_does_not_count(fleet):
    farm = fleet.farm(Scripted("a", fleet, contended, contended))
    (number,) = fleet.submit(farm)
    play(farm)
    found = job(farm, number)
    assert found.state == "ok" and found.attempts == 0 and found.postponed == 2
    assert len(fleet.store.events("contended")) == 2 and len(farm.queue.readings(number)) == 1
    farm = fleet.farm(Scripted("b", fleet, *[contended] * 9), policy=Policy(max_postponed=3))
    (never,) = fleet.submit(farm)
    play(farm)
    assert job(farm, never).state == "failed" and "put off 3 times" in job(farm, never).reason


@pytest.mark.parametrize("garbage", [5, {}, *({"prefill_seconds": [value] * 9} for value in (-1.0, "x", 1e400, None, 1e300))])
def test_nonsense_from_a_device_is_a_lost_try(fleet, garbage):
    device = Scripted("a", fleet, lambda found: {**found, "time_to_first_token_ms": None, "samples": garbage})
    farm = fleet.farm(device)
    (number,) = fleet.submit(farm)
    play(farm)
    assert job(farm, number).state == "ok" and job(farm, number).attempts == 1
    assert device.calls >= 2 and fleet.store.events("lost")[0].detail["reason"].startswith("a: ")


def test_a_late_answer_with_an_old_fence_is_an_event(fleet):
    """The device hangs past its lease; another one does the job meanwhile; then the first one answers after all."""
    hung, fine = Scripted("a", fleet), Scripted("b", fleet)
    farm = fleet.farm(hung, fine)
    (number,) = fleet.submit(farm)

    def hang(found):
        fleet.clock.sleep(1000.0)
        assert farm.work(farm.members[1]), "taken over"
        return found

    hung.script = [hang]
    farm.work(farm.members[0])
    assert [reading.device for reading in farm.queue.readings(number)] == ["b"] and job(farm, number).fence == 2
    assert job(farm, number).attempts == 1 and violations(farm.queue) == []
    assert fleet.store.devices()[0].failures == 1 and not farm.members[0].stuck
    late = fleet.store.events("late_answer")
    assert len(late) == 1 and late[0].device == "a" and late[0].detail["fence"] == 1 and late[0].detail["results"]


def outlier(found):
    values = found["samples"]["prefill_seconds"]
    return {**found, "samples": {**found["samples"], "prefill_seconds": [*values[:-1], 4 * values[-1]]}}


def test_an_outlier_is_confirmed_once_on_another_device_and_both_are_kept(fleet):
    farm = fleet.farm(Scripted("a", fleet, outlier), Scripted("b", fleet, outlier))
    (number,) = fleet.submit(farm)
    play(farm)
    readings = farm.queue.readings(number)
    assert sorted((reading.device, reading.role) for reading in readings) in (
        [("a", "confirmation"), ("b", "result")], [("a", "result"), ("b", "confirmation")])  # fmt: skip
    assert job(farm, number).attempts == 0 and readings[0].detail["outliers"] and not fleet.store.events("disagreement")

    def doubled(found):
        values = [2 * value for value in found["samples"]["prefill_seconds"]]
        return outlier({**found, "samples": {**found["samples"], "prefill_seconds": values}})

    twice = Scripted("c", fleet, *[doubled] * 9)
    farm = fleet.farm(twice, Scripted("d", fleet))
    (number,) = fleet.submit(farm)
    farm.work(farm.members[0])
    play(farm)
    assert abs(fleet.store.events("disagreement")[0].detail["off"]) == pytest.approx(0.5, abs=0.02)
    alone = fleet.farm(Scripted("e", fleet, outlier))
    (number,) = fleet.submit(alone)
    play(alone)
    assert len(alone.queue.readings(number)) == 1, "nobody else could confirm it"


def test_a_predictor_may_ask_for_a_confirmation(fleet):
    farm = fleet.farm(Scripted("a", fleet), Scripted("b", fleet))
    (number,) = fleet.submit(farm)
    play(farm)
    again = farm.confirm(number, "5 sigma from the predictor")
    play(farm)
    devices = {farm.queue.readings(entry)[0].device for entry in (number, again)}
    assert devices == {"a", "b"} and farm.queue.newest(number).id == again


def test_processor_time_may_be_asked_for_on_a_computer_that_others_use(fleet):
    def busy(factor):
        return lambda found: {
            **found, "prefill_cpu_seconds": factor * 0.004, "decode_cpu_seconds": factor * 0.016,
            "samples": {name: [10 * value for value in values] for name, values in found["samples"].items()},
        }  # fmt: skip

    policy = Policy(processor_time=True)
    farm = fleet.farm(Scripted("a", fleet, *[busy(1 + place % 3 / 100) for place in range(20)]), sentinel=True, policy=policy)
    (number,) = fleet.submit(farm)
    play(farm)
    (reading,) = farm.queue.readings(number)
    assert set(reading.values) == {"cpu_ttft_ms", "cpu_decode_tok_s", "peak_memory_bytes"} and reading.sentinel_ratio == 1.0
    assert reading.values["cpu_ttft_ms"] == pytest.approx(4.04)
    assert reading.values["cpu_decode_tok_s"] == pytest.approx(8 / 0.01616)
    assert len(reading.samples) >= 3 and 0 < reading.errors["cpu_ttft_ms"] < 0.04
    with pytest.raises(ValueError, match="threads=2 by processor time"):
        farm.submit("two", fleet.request(64, threads=2))
    silent = fleet.farm(Scripted("b", fleet), policy=policy)
    (number,) = fleet.submit(silent)
    play(silent)
    assert job(silent, number).state == "infeasible" and "tells no processor time" in job(silent, number).reason


def test_a_changed_file_is_not_measured_in_place_of_the_one_submitted(fleet):
    farm = fleet.farm(fleet.device())
    (number,) = fleet.submit(farm)
    fleet.request(64).model.write_text("{}")
    play(farm)
    assert job(farm, number).state == "failed" and "no longer the file" in job(farm, number).reason


def test_members_that_do_not_go_together_are_refused(fleet):
    emulated = fleet.device("b")
    emulated.fidelity = "emulated"
    with pytest.raises(ValueError, match="analytic and emulated"):
        fleet.farm(fleet.device("a"), emulated)
    with pytest.raises(ValueError, match="each once"):
        fleet.farm(fleet.device("a"), fleet.device("a"))
    with pytest.raises(ValueError, match="expected one of \\['', 'y'\\]"):
        fleet.submit(fleet.farm(fleet.device("a"), emulated, classes=("", "y")), device_class="z")


def test_every_fault_at_once_and_every_job_ends_once(fleet):
    faults = Faults(crash=0.05, timeout=0.05, lost=0.1, wrong_output=0.05, nonsense=0.05, late=0.05)
    devices = [fleet.device(name, Physics(), faults=faults, seed=seed) for seed, name in enumerate("abc")]
    farm = fleet.farm(*devices, sentinel=True)
    ended = []
    farm.on_end = lambda found: ended.append(found.id)
    for i in range(60):
        request = fleet.request(64 + i)
        farm.submit(f"job-{i}", request, expect=fleet.device("right").measure(request)["logits_crc32c"])
    play(farm, 3000)
    states = [found.state for found in farm.queue.jobs()]
    assert not farm.queue.jobs("waiting", "running") and sorted(ended) == sorted(found.id for found in farm.queue.jobs())
    assert states.count("ok") > 30 and len(set(states)) > 1
    for found in farm.queue.jobs("ok"):
        truth = devices[0].truth(fleet.request(64 + int(found.name.strip("+").split("-")[1])))
        assert found.results["ttft_ms"] / 1e3 == pytest.approx(truth[0], rel=0.05), "fast and wrong never won"


def test_threads_do_what_steps_do(fleet):
    farm = fleet.farm(*[SimulatedDevice(name, real_s=0.001, physics=Physics(outliers=0.0)) for name in "ab"])
    farm.clock = Clock()
    jobs, done = fleet.submit(farm, 12), threading.Event()
    farm.on_end = lambda found: done.set() if not farm.queue.jobs("waiting", "running") else None
    with farm:
        assert done.wait(20)
    assert {job(farm, number).state for number in jobs} == {"ok"} and violations(farm.queue) == []


def test_statistics_of_raw_repeats():
    assert outliers([1.0, 1.01, 0.99, 1.0, 3.0]) == [4] and outliers([1.0, 1.001, 1.0, 1.0, 1.0]) == [] == outliers([1.0, 9.0])
    assert half_width([1.0]) == 0.0 == standard_error([1.0]) and half_width([1.0] * 5) == 0.0
    wide, narrow = [1.0, 1.1, 0.9, 1.2, 0.8], [1.0, 1.01, 0.99, 1.02, 0.98]
    assert half_width(wide) == pytest.approx(10 * half_width(narrow), rel=0.05) and standard_error(wide) > 0.05


class Phone(Scripted):
    """Gone until it is rebooted, and for a minute after that."""

    def __init__(self, name, fleet, helps):
        super().__init__(name, fleet, *[DeviceError("usb")] * 2)
        self.driver, self.helps, self.asked, self.back = self, helps, [], float("inf")

    def alive(self):
        return len(self.asked) == 0 or self.clock.now() >= self.back

    def reconnect(self, hard):
        self.asked.append(hard)
        if hard and self.helps:
            self.back = self.clock.now() + 60.0

    def measure(self, request):
        if not self.script:
            return super().measure(request)
        self.asked = self.asked or [False]
        raise self.script.pop()


@pytest.mark.parametrize(("allowed", "helps", "rebooted"), [(True, True, True), (False, True, False), (True, False, True)])
def test_a_phone_that_reconnecting_does_not_bring_back_is_rebooted_where_that_is_allowed(fleet, allowed, helps, rebooted):
    phone = Phone("a", fleet, helps)
    phone.script = phone.script[:1]
    farm = fleet.farm(phone, policy=Policy(reboot=allowed))
    (number,) = fleet.submit(farm)
    play(farm, 2000)
    assert phone.asked.count(False) > 1 and (True in phone.asked) == rebooted == bool(fleet.store.events("rebooted"))
    assert (job(farm, number).state == "ok") == (allowed and helps)
    assert bool(fleet.store.events("quarantined")) != (allowed and helps)
