"""Mixtures in the latency model and on modelled devices: columns by hand, dense models as before, accuracy, bad files."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("botorch")

from kernels.packed_file import PackedFileError, f32, write_packed  # noqa: E402
from modeling.config import ModelConfig  # noqa: E402
from modeling.moe_config import MoEConfig  # noqa: E402
from search.devices import MeasureRequest, open_device  # noqa: E402
from search.devices.modelled import Experts, Shape, load_profile, operation_times  # noqa: E402
from search.latency import features, mixture  # noqa: E402
from search.latency.gates import errors  # noqa: E402
from search.latency.model import LatencyModel  # noqa: E402
from search.latency.reading import Key, Reading  # noqa: E402
from search.space import Space  # noqa: E402
from stages.export_packed import model_metadata  # noqa: E402
from stages.random_packed import write_pocket  # noqa: E402

PHONE = load_profile("oneplus_12")
MOE = MoEConfig(num_experts=14, top_k=2, expert_size=64, shared_size=128)
DENSE = ModelConfig(vocab_size=512, hidden_size=64, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=32, ffn_size=256)
MIXED = replace(DENSE, moe=MOE)
SPACE = Space.from_dict({
    "num_layers": [2, 4, 6], "hidden_size": [128, 256, 384], "ffn_size": [256, 512, 1024], "num_heads": [4],
    "num_kv_heads": [1], "experts": [1, 2, 4, 8], "granularity": [1, 2, 4, 8], "shared_experts": [0, 1, 2],
    "attention": ["full", "window"], "fixed": {"vocab_size": 4096, "window": 64},
})  # fmt: skip


def truth(config: ModelConfig, metric: str = "ttft", context: int = 128) -> float:
    """ms on the modelled device."""
    shape = Shape.of(model_metadata(config), int8_head=False)
    tokens, past = (1, context) if metric == "decode" else (context, 0)
    return 1e3 * sum(operation_times(shape, PHONE, tokens=tokens, past=past, threads=1, kv="f16").values())


def test_columns_of_dense_models_are_to_the_last_bit_what_they_were() -> None:
    space = Space.from_dict({
        "num_layers": list(range(6, 13)), "hidden_size": [256, 384, 512, 640, 768], "ffn_size": [512, 1024, 1536, 2048, 2560],
        "num_heads": [4, 6, 8, 12], "num_kv_heads": [1, 2, 4], "fixed": {"vocab_size": 8192, "window": 128},
    })  # fmt: skip
    configs = [space.to_config(candidate) for candidate in space.sample(random.Random(77), 50)]
    before = {"ttft": (16, "9b09d80420717000"), "decode": (19, "53978e34efdead9d"), "peak_memory": (5, "aa70c13fb59862da")}
    for metric, (columns, digest) in before.items():
        table = features.feature_table(configs, metric, 512, 2)
        old = features.feature_table(configs, metric, 512, 2, mixtures=False)
        assert old.shape == (50, columns) and hashlib.sha256(old.tobytes()).hexdigest()[:16] == digest
        assert (table[:, :columns] == old).all() and not table[:, columns:].any()


def test_a_prompts_columns_by_hand() -> None:
    dense, mixed = (features.features(config, "ttft", 16) for config in (DENSE, MIXED))
    for name in ("ffn_gflop", "ffn_m", "hidden_m", "projection_gflop", "kv_mb", "layers", "head_gflop"):
        assert mixed[name] == pytest.approx(dense[name]), f"{name}: as much is active"
    share = 1 - (1 - 2 / 14) ** 16
    assert mixture.touched(MOE, 16) == pytest.approx(share) and 0.9 < share < 0.92
    expert = 3 * 64 * 64
    assert mixed["router_gflop"] == pytest.approx(2e-9 * 16 * 14 * 64 * 3)
    assert mixed["router_m"] == pytest.approx(1e-6 * 16 * 14 * 3)
    assert mixed["expert_rows_m"] == pytest.approx(1e-6 * 16 * 2 * 64 * 3)
    assert mixed["expert_calls_k"] == pytest.approx(1e-3 * 3 * 14 * share)
    assert mixed["experts_mb"] == pytest.approx(1e-6 * 0.5625 * 3 * 14 * share * expert)
    more = 3 * (14 * 64 + 14 * share * expert + expert * 2 - 3 * 64 * 256)  # router, experts in use, shared; no dense one
    assert mixed["weight_mb"] - dense["weight_mb"] == pytest.approx(1e-6 * 0.5625 * more)


def test_a_decoded_token_reads_the_experts_it_uses_and_memory_holds_all() -> None:
    dense, mixed = (features.features(config, "decode", 64) for config in (DENSE, MIXED))
    router = 1e-6 * 0.5625 * 3 * 14 * 64
    assert mixed["weight_mb"] == pytest.approx(dense["weight_mb"] + router)
    assert mixed["expert_calls_k"] == pytest.approx(1e-3 * 3 * 2)
    held = features.features(MIXED, "peak_memory", 64)["weight_mb"]
    idle = 1e-6 * 0.5625 * 3 * 12 * 3 * 64 * 64
    assert held == pytest.approx(mixed["weight_mb"] + idle)
    assert features.proxies(MIXED, "decode", 64)["flops"] < 1.05 * features.proxies(DENSE, "decode", 64)["flops"]


def test_what_a_cache_holds_is_a_share_of_all_experts() -> None:
    large = replace(MIXED, hidden_size=512, ffn_size=2048, moe=replace(MOE, expert_size=512, shared_size=1024, num_experts=62))
    found = features.features(large, "decode", 64)
    assert found["weight_mb"] > 4 and found["beyond_4_mb"] > found["weight_mb"] - 1, "four of some eighty MB are there"
    assert features.features(large, "decode", 64)["beyond_16_mb"] < found["beyond_4_mb"]
    assert features.features(MIXED, "decode", 64)["beyond_4_mb"] == 0


def test_dense_first_blocks_and_repeats_count() -> None:
    first = features.features(replace(MIXED, moe=replace(MOE, dense_layers=1)), "ttft", 16)
    every, twice = features.features(MIXED, "ttft", 16), features.features(replace(MIXED, block_repeat=2), "ttft", 16)
    for name in mixture.TIMES:
        assert first[name] == pytest.approx(every[name] * 2 / 3) and twice[name] == pytest.approx(2 * every[name])
    wide = replace(MIXED, ffn_size=512, moe=replace(MOE, dense_layers=1))
    assert features.features(wide, "ttft", 16)["ffn_gflop"] == pytest.approx(every["ffn_gflop"] * (512 + 2 * 256) / (3 * 256))


def test_the_model_predicts_mixtures_and_dense_models_that_it_has_not_seen() -> None:
    configs = [SPACE.to_config(candidate) for candidate in SPACE.sample(random.Random(0), 70)]
    unseen = [SPACE.to_config(candidate) for candidate in SPACE.sample(random.Random(1), 120)]
    draw = np.random.default_rng(0)
    for metric, most in (("ttft", 5), ("decode", 7)):
        key = Key(device_class="phone", runtime="pocketforge", threads=1, metric=metric, context=128)
        values = [truth(config, metric) * float(np.exp(0.01 * draw.standard_normal())) for config in configs]
        read = [Reading(config=config, value=value, std_error=0.01 * value, fidelity="analytic")
                for config, value in zip(configs, values, strict=True)]  # fmt: skip
        model = LatencyModel.fit(key, read)
        for some in ([c for c in unseen if c.moe], [c for c in unseen if not c.moe]):
            found = errors(np.array([truth(config, metric) for config in some]), model.predict(some)[0])
            assert len(some) > 15 and found["mape"] < most and found["kendall"] > 0.9, (metric, found)
        again = LatencyModel.load(model.state())
        np.testing.assert_allclose(again.predict(unseen[:9])[0], model.predict(unseen[:9])[0], rtol=1e-6)


def test_a_modelled_device_counts_active_experts_tiles_and_the_router() -> None:
    experts = Experts(count=14, chosen=2, width=64, shared=128, first=0)
    dense = Shape(64, 64, 32, 256, 512, (None,) * 3, 0.5625)
    mixed = replace(dense, experts=experts)

    def times(shape: Shape, tokens: int) -> dict[str, float]:
        return operation_times(shape, replace(PHONE, launch_us=0.0), tokens=tokens, past=0, threads=1, kv="f16")

    one = times(mixed, 1)
    assert one["gate and up"] == pytest.approx(times(dense, 1)["gate and up"]), "a token pays for what is active"
    assert one["gather"] == 0 and one["route"] > 0 and set(times(dense, 1)) < set(one)
    # 8 tokens use 9.9 of 14 experts with 1.6 rows each, which fill a tile of four all the same; the shared one has all 8.
    used = experts.used(8)
    assert used == pytest.approx(14 * (1 - (12 / 14) ** 8))
    assert times(mixed, 8)["down"] == pytest.approx(times(dense, 8)["down"] * (used * 4 * 64 + 8 * 128) / (8 * 256))
    assert times(mixed, 512)["down"] < 1.1 * times(dense, 512)["down"], "large groups fill their tiles"
    first = replace(mixed, experts=replace(experts, first=3))
    assert times(first, 8) == times(dense, 8)


def test_a_packed_mixture_is_measured_and_a_bad_one_refused(tmp_path) -> None:
    write_pocket(MIXED, tmp_path / "mixed.pocket")
    request = MeasureRequest(model=tmp_path / "mixed.pocket", prompt_tokens=32, decode_tokens=4)
    for name in ("model:oneplus_12", "local"):
        found = open_device(name).measure(request)
        assert found["fidelity"] == {"local": "host"}.get(name, "analytic")
        assert found["operations"]["prefill_ms"]["route"] > 0 and found["operations"]["prefill_ms"]["mix"] > 0
    described = model_metadata(MIXED)
    wrong = ({"top_k": 15}, {"top_k": "x"}, {"expert_size": 0}, {"num_experts": None}, {"shared_size": -1})
    for number, change in enumerate(wrong):
        path = tmp_path / f"{number}.pocket"
        model = {**described, "moe": {**described["moe"], **change}}
        write_packed(path, {"model": model}, [lambda: f32("embed", np.zeros(4, np.float32))], lambda data: 0)
        with pytest.raises(PackedFileError, match="describes no model"):
            open_device("model:oneplus_12").measure(MeasureRequest(model=path))
    path = tmp_path / "list.pocket"
    write_packed(path, {"model": {**described, "moe": [3]}}, [lambda: f32("embed", np.zeros(4, np.float32))], lambda data: 0)
    with pytest.raises(PackedFileError, match="describes no model"):
        open_device("model:oneplus_12").measure(MeasureRequest(model=path))
