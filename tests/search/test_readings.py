"""Buying latency readings on a simulated device: until the gates are met and no longer, by wall or by processor time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("botorch", reason="the search extra is not installed")

from modeling.identity import config_key
from search.farm import Farm
from search.members import Member, Policy
from search.readings import LatencyPlan, Readings, learn_latency
from search.simulated import Physics, SimulatedDevice, write_shape
from search.space import Space
from search.store import Store
from search.sweep import build_once

SPACE = Space.from_dict({
    "num_layers": [4, 6, 8], "hidden_size": [128, 192, 256], "ffn_size": [256, 512, 768], "num_heads": [4],
    "num_kv_heads": [2, 4], "block_repeat": [1, 2],
    "fixed": {"vocab_size": 2048, "max_positions": 512, "window": 64},
})  # fmt: skip
PLAN = LatencyPlan(prompt_tokens=128, decode_tokens=4, readings=12, more=6, max_readings=36, timeout_s=1.0)


class Counting(SimulatedDevice):
    """Tells the processor time of a thread, as the real program does; a tenth of it more passed meanwhile."""

    def measure(self, request):
        found = super().measure(request)
        repeats = request.repeats
        totals = {name: sum(values) / repeats for name, values in found["samples"].items()}
        return {**found, "prefill_cpu_seconds": totals["prefill_seconds"] / 1.1,
                "decode_cpu_seconds": totals["decode_step_seconds"] / 1.1}  # fmt: skip


def readings_in(folder: Path, *, noise: float = 0.0, plan: LatencyPlan = PLAN, **policy) -> Readings:
    physics = Physics(noise=noise, outliers=0.0, warmup_factor=1.0)
    farm = Farm(Store.open(folder / "sweep.db", {}), [Member(Counting(physics=physics, real_s=0.0))],
                policy=Policy(warmup=0, min_repeats=3, max_repeats=9, **policy))  # fmt: skip
    return Readings(farm, SPACE, plan, build_once(folder / "shapes", write_shape, config_key))


def test_buys_no_more_once_the_gates_are_met(tmp_path):
    readings = readings_in(tmp_path)
    with readings.farm:
        model = learn_latency(readings, 0, {"ttft_ms": None})["ttft_ms"]
    fits = [event.detail for event in readings.queue.store.events("latency_model")]
    assert fits[-1]["report"]["passed"] and not any(fit["report"]["passed"] for fit in fits[:-1])
    assert fits[-1]["bought"] == len(model.readings) == PLAN.readings + PLAN.more * (len(fits) - 1) < PLAN.max_readings


def test_stops_at_the_limit_where_the_gates_are_out_of_reach(tmp_path):
    plan = LatencyPlan(prompt_tokens=128, decode_tokens=4, readings=12, more=6, max_readings=20, timeout_s=1.0)
    readings = readings_in(tmp_path, noise=0.2, plan=plan)
    with readings.farm:
        model = learn_latency(readings, 0, {"ttft_ms": None})["ttft_ms"]
    fits = [event.detail for event in readings.queue.store.events("latency_model")]
    assert [fit["bought"] for fit in fits] == [12, 18, 20] and len(model.readings) == 20
    assert all(fit["report"]["failures"] for fit in fits)


def test_processor_time_is_what_is_learned_where_the_farm_goes_by_it(tmp_path):
    (tmp_path / "wall").mkdir()
    (tmp_path / "processor").mkdir()
    wall, processor = readings_in(tmp_path / "wall"), readings_in(tmp_path / "processor", processor_time=True)
    candidates = SPACE.sample(random.Random(0), 12)
    for readings in (wall, processor):
        with readings.farm:
            readings.wait([readings.submit(f"latency/{SPACE.key(c)}", c) for c in candidates])
    by_wall, by_processor = ({config_key(found.config): found.value for found in readings.all(readings.metric("ttft_ms"))}
                             for readings in (wall, processor))  # fmt: skip
    assert len(by_wall) == 12 and by_processor == pytest.approx({key: value / 1.1 for key, value in by_wall.items()})
    decode = wall.metric("decode_ms")
    model = processor.fit(decode)
    assert model.key.metric == "decode"
    assert [r.value for r in model.readings] == pytest.approx([r.value / 1.1 for r in wall.all(decode)])
