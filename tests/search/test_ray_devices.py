"""A device in a Ray actor does what it does at hand, and its actor's death is a lost try."""

from __future__ import annotations

import os

import pytest

from modeling.config import ModelConfig
from search.devices import MeasureRequest, open_device
from search.farm import Farm
from search.jobs import violations
from search.members import Member, Policy
from search.store import Store
from tests.search.test_farm import BASE

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not os.environ.get("POCKETFORGE_SLOW_TESTS"),
                       reason="a Ray head of its own takes a minute; POCKETFORGE_SLOW_TESTS=1 runs it"),
]


@pytest.fixture
def cluster(monkeypatch):
    for name, value in {"AUTH_MODE": "disabled", "USAGE_STATS_ENABLED": "0", "raylet_start_wait_time_s": "120"}.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_farm_measures_on_an_actor(cluster, tmp_path):
    from search.ray_devices import RayDevice
    from stages.random_packed import write_pocket

    with pytest.raises(ValueError, match="device 'toaster'"):
        RayDevice("toaster")
    config = ModelConfig(**{**BASE.__dict__, "attention": ()})
    write_pocket(config, tmp_path / "m.pocket")
    request = MeasureRequest(model=tmp_path / "m.pocket", prompt_tokens=16, decode_tokens=4)
    device = RayDevice("model:oneplus_12")
    with Store.open(tmp_path / "s.sqlite", {}) as store:
        farm = Farm(store, [Member(device)], policy=Policy(reconnects=100, reconnect_s=0.2))
        first = farm.submit("first", request)
        assert farm.work(farm.members[0])
        done = farm.queue.job(first)
        here = open_device("model:oneplus_12").measure(request)
        assert done.state == "ok" and done.results["ttft_ms"] == pytest.approx(here["time_to_first_token_ms"])
        assert farm.queue.readings(first)[0].device == "ray:model:oneplus_12" and not device.heartbeat("first")
        ray.kill(device._actor, no_restart=False)
        second = farm.submit("second", request)
        for _ in range(20):
            farm.work(farm.members[0])
            if farm.queue.job(second).ended:
                break
        assert farm.queue.job(second).state == "ok" and violations(farm.queue) == []
