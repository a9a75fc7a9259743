"""The latency model on a modelled device: accuracy, gates, band, buying, transfer, state, refusals."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("botorch")

from modeling.config import ModelConfig  # noqa: E402
from search.devices.modelled import Profile, Shape, load_profile, operation_times  # noqa: E402
from search.latency import acquire, features, transfer  # noqa: E402
from search.latency.gates import errors  # noqa: E402
from search.latency.gaussian import GaussianProcess  # noqa: E402
from search.latency.model import LatencyModel  # noqa: E402
from search.latency.reading import MIN_READINGS, Key, Reading  # noqa: E402
from search.space import Space  # noqa: E402

SPACE = Space.from_dict({
    "num_layers": list(range(6, 13)), "hidden_size": [256, 384, 512, 640, 768], "ffn_size": [512, 1024, 1536, 2048, 2560],
    "num_heads": [4, 6, 8, 12], "num_kv_heads": [1, 2, 4], "fixed": {"vocab_size": 8192, "window": 128},
})  # fmt: skip
PHONE = load_profile("oneplus_12")
KEY = Key(device_class="phone", runtime="pocketforge", threads=1, metric="ttft", context=512)


def truth(config: ModelConfig, profile: Profile = PHONE, metric: str = "ttft", context: int = 512) -> float:
    """ms on the modelled device: a roofline for each operation, so no exact sum of the features."""
    seen = {"full": None, "window": config.window, "skip": 0}
    shape = Shape(config.hidden_size, config.query_size, config.kv_size, config.ffn_size, config.vocab_size,
                  tuple(seen[kind] for kind in config.attention_kinds), 0.5625)  # fmt: skip
    tokens, past = (1, context) if metric == "decode" else (context, 0)
    return 1e3 * sum(operation_times(shape, profile, tokens=tokens, past=past, threads=1, kv="f16").values())


def configs(count: int, seed: int) -> list[ModelConfig]:
    return [SPACE.to_config(candidate) for candidate in SPACE.sample(random.Random(seed), count)]


def readings(count: int, seed: int, profile: Profile = PHONE, metric: str = "ttft") -> list[Reading]:
    """2 % noise, 3 % of the readings 1.5 times too slow."""
    draw = np.random.default_rng(seed)
    found = []
    for config in configs(count, seed):
        value = truth(config, profile, metric) * np.exp(0.02 * draw.standard_normal()) * (1.5 if draw.random() < 0.03 else 1)
        found.append(Reading(config=config, value=value, std_error=0.02 * value, fidelity="analytic"))
    return found


@pytest.fixture(scope="module")
def phone() -> LatencyModel:
    return LatencyModel.fit(KEY, readings(100, 0))


@pytest.fixture(scope="module")
def unseen() -> list[ModelConfig]:
    return configs(300, 99)


def test_predicts_unseen_architectures_through_noise_and_outliers(phone: LatencyModel, unseen: list[ModelConfig]) -> None:
    expected = np.array([truth(config) for config in unseen])
    mean, deviation = phone.predict(unseen)
    found = errors(expected, mean)
    assert found["r2"] > 0.99 and found["mape"] < 3 and found["kendall"] > 0.94
    assert mean.shape == deviation.shape == (300,) and (deviation > 0).all()
    low, high = phone.interval(unseen)
    assert 0.85 < np.mean((low <= expected) & (expected <= high)) <= 1 and (low > 0).all()


def test_beats_the_proxies(phone: LatencyModel, unseen: list[ModelConfig]) -> None:
    expected = np.array([truth(config) for config in unseen])
    ours = errors(expected, phone.predict(unseen)[0])["kendall"]
    for name in ("parameters", "flops"):
        proxy = np.array([features.proxies(config, "ttft", 512)[name] for config in unseen])
        assert errors(expected, proxy)["kendall"] < ours - 0.03


def test_gates_pass_on_clean_readings_and_fail_on_noise() -> None:
    clean = [replace(item, value=truth(item.config)) for item in readings(60, 1)]
    report = LatencyModel.fit(KEY, clean).report()
    assert report.r2 > 0.97 and report.mape < 5 and 90 <= report.coverage <= 100
    draw = np.random.default_rng(0)
    noise = [replace(item, value=float(np.exp(draw.standard_normal())), std_error=None) for item in clean]
    bad = LatencyModel.fit(KEY, noise).report()
    assert not bad.passed and any(text.startswith("r2 is") for text in bad.failures())
    assert bad.to_dict()["passed"] is False


def test_a_decode_and_a_memory_model() -> None:
    decode = LatencyModel.fit(replace(KEY, metric="decode"), readings(60, 2, metric="decode"))
    held = configs(100, 98)
    assert errors(np.array([truth(c, metric="decode") for c in held]), decode.predict(held)[0])["mape"] < 3
    memory = [replace(item, value=(item.config.weight_bytes(4, 32) + item.config.kv_bytes(512)) / 2**20, std_error=None)
              for item in readings(40, 3)]  # fmt: skip
    fitted = LatencyModel.fit(replace(KEY, metric="peak_memory"), memory)
    expected = np.array([(c.weight_bytes(4, 32) + c.kv_bytes(512)) / 2**20 for c in held])
    assert errors(expected, fitted.predict(held)[0])["mape"] < 2


def test_state_is_json_and_predicts_the_same(phone: LatencyModel, unseen: list[ModelConfig]) -> None:
    again = LatencyModel.load(json.loads(json.dumps(phone.state())))
    for one, other in zip(phone.predict(unseen[:20]), again.predict(unseen[:20]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    moved = transfer.transfer(phone, replace(KEY, device_class="other"), readings(20, 5, scaled(2.5)))
    back = LatencyModel.load(json.loads(json.dumps(moved.state())))
    np.testing.assert_allclose(moved.predict(unseen[:20])[0], back.predict(unseen[:20])[0], rtol=1e-6)
    with pytest.raises(ValueError, match="not the state of a latency model"):
        LatencyModel.load({"key": {}})


def scaled(factor: float) -> Profile:
    """A phone with slower cores and the same memory."""
    cores = tuple(replace(core, ghz=core.ghz / factor) for core in PHONE.cores)
    return replace(PHONE, cores=cores)


def test_transfer_needs_few_readings(phone: LatencyModel, unseen: list[ModelConfig]) -> None:
    slow = scaled(2.5)
    key = replace(KEY, device_class="slow phone")
    pool = configs(200, 6)
    loss = -np.log([config.num_params() for config in pool])
    chosen = transfer.first_readings(phone, pool, loss, 15, seed=0)
    assert len(set(chosen)) == 15
    points = [Reading(config=pool[i], value=truth(pool[i], slow), std_error=None, fidelity="device") for i in chosen]
    moved = transfer.transfer(phone, key, points)
    expected = np.array([truth(config, slow) for config in unseen])
    assert errors(expected, moved.predict(unseen)[0])["mape"] < 4
    assert errors(expected, phone.predict(unseen)[0])["mape"] > 30
    assert moved.fidelity == "device" and phone.fidelity == "analytic"
    with pytest.raises(ValueError, match="says nothing about decode"):
        transfer.transfer(phone, replace(key, metric="decode"), points)
    with pytest.raises(ValueError, match="too few; expected 10 to 50"):
        transfer.transfer(phone, key, points[:5])


def test_buying_prefers_the_unsure_near_the_front() -> None:
    few = LatencyModel.fit(KEY, readings(30, 7))
    pool = configs(200, 8)
    loss = -np.log([config.num_params() for config in pool])
    picked = acquire.choose_readings(few, pool, loss, 0.1 * loss.std(), 10, seed=0)
    assert len(set(picked)) == 10
    mean, _ = few.predict(pool)
    chance = acquire.front_chance(np.log(mean), np.full(200, 0.02), loss, 0.1 * loss.std(), np.random.default_rng(0))
    assert chance[picked].mean() > 3 * chance.mean()
    limit = float(np.quantile(mean, 0.3))
    within = acquire.choose_readings(few, pool, loss, 0.1 * loss.std(), 10, seed=0, latency_limit=limit)
    assert (mean[within] < 1.2 * limit).mean() > 0.7
    with pytest.raises(ValueError, match="the pool has 5 candidates"):
        acquire.choose_readings(few, pool[:5], loss[:5], 0.1, 10, seed=0)


def test_what_cannot_be_fitted_is_refused() -> None:
    good = readings(20, 9)
    with pytest.raises(ValueError, match="fidelity analytic and host cannot be mixed"):
        LatencyModel.fit(KEY, [*good, replace(good[0], fidelity="host")])
    with pytest.raises(ValueError, match="too few"):
        LatencyModel.fit(KEY, good[: MIN_READINGS - 1])
    with pytest.raises(ValueError, match="expected a value above 0 ms"):
        LatencyModel.fit(KEY, [*good, replace(good[0], value=float("nan"))])
    with pytest.raises(ValueError, match="metric 'warmth' is unknown"):
        replace(KEY, metric="warmth")


def test_features_count_what_the_config_counts() -> None:
    for config in configs(20, 10):
        row = features.features(config, "ttft", 512, 2)
        work = row["ffn_gflop"] + row["projection_gflop"]
        matrices = config.num_params() - config.vocab_size * config.hidden_size
        assert work == pytest.approx(2e-9 * 512 * matrices, rel=0.01)  # but the norms
        full = config.attention_kinds.count("full")
        assert row["full_scores_gflop"] == pytest.approx(4e-9 * config.query_size * full * 512 * 513 / 2)
        one = features.features(config, "decode", 512)
        assert one["ffn_gflop"] * 512 == pytest.approx(row["ffn_gflop"])
    longer = [features.features(config, "ttft", 1024)["window_scores_gflop"] for config in configs(5, 10)]
    shorter = [features.features(config, "ttft", 512)["window_scores_gflop"] for config in configs(5, 10)]
    assert all(b <= 2.4 * a for a, b in zip(shorter, longer, strict=True))  # linear beyond the window, not quadratic


def test_a_repeated_block_works_twice_and_is_stored_once() -> None:
    (config,) = configs(1, 11)
    once, twice = (features.features(replace(config, block_repeat=times), "decode", 512) for times in (1, 2))
    for name in ("ffn_gflop", "projection_gflop", "softmax_m", "hidden_m", "cache_m", "layers", "kv_mb"):
        assert twice[name] == pytest.approx(2 * once[name]), name
    for name in ("weight_mb", "head_gflop", "embedding_mb"):
        assert twice[name] == once[name], name


def test_scores_cost_by_width_and_by_head() -> None:
    config = replace(configs(1, 12)[0], num_heads=4, num_kv_heads=4, head_dim=64)
    wide = features.features(config, "ttft", 512)
    narrow = features.features(replace(config, num_heads=8, head_dim=32), "ttft", 512)
    assert narrow["full_scores_gflop"] == wide["full_scores_gflop"] and narrow["softmax_m"] == 2 * wide["softmax_m"]


def test_uneven_threads_are_panels_that_cannot_be_shared_out() -> None:
    config = replace(configs(1, 13)[0], hidden_size=256, ffn_size=528, num_heads=4, num_kv_heads=1, head_dim=32)
    waste = [features.features(config, "ttft", 512, threads)["uneven_threads_gflop"] for threads in (1, 2, 4)]
    # Of 1056, 256, 192 and 256 rows only the first are no multiple of 4 panels: 32 rows lack.
    assert waste == [0, 0, pytest.approx(2e-9 * 512 * 32 * 256 * config.num_layers)]


def test_points_that_leave_a_column_constant_are_predicted_with_the_parameters_of_all():
    """A fold of cross-validation may hold the only reading that differs in something."""
    inputs = np.c_[np.linspace(0, 1, 12), np.zeros(12)]
    inputs[5, 1] = 1.0
    whole = GaussianProcess(inputs, np.sin(3 * inputs[:, 0]) + inputs[:, 1], np.full(12, 1e-6))
    rest = np.arange(12) != 5
    fold = whole.parameters_for(inputs[rest], np.sin(3 * inputs[rest, 0]), np.full(11, 1e-6))
    mean, deviation = fold.predict(inputs)
    assert np.allclose(mean[rest], np.sin(3 * inputs[rest, 0]), atol=0.05)
    assert deviation[5] > 3 * deviation[rest].max(), "what it has not seen it is unsure of"


def test_features_are_counts_of_what_the_runtime_does():
    """Of a model small enough to count by hand; none is below 0, for a sum with weights of at least 0."""
    config = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=96,
                         max_positions=64, attention=("full", "skip"))  # fmt: skip
    found = features.features(config, "ttft", 8)
    pairs = 8 * 9 / 2  # each token sees itself and those before it
    assert found["softmax_m"] == pytest.approx(1e-6 * 4 * pairs)
    assert found["full_scores_gflop"] == pytest.approx(4e-9 * 64 * pairs)
    assert found["ffn_gflop"] == pytest.approx(2e-9 * 8 * 3 * 32 * 96 * 2)
    assert found["projection_gflop"] == pytest.approx(2e-9 * 8 * 2 * 32 * (64 + 32))
    for metric in features.METRICS:
        assert (features.feature_table([config], metric, 8, threads=2) >= 0).all()
