"""A search's record as a real one would be: models drawn from a space, an analytic time, a made-up loss, some failures."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, replace

from launch.sweep_collect import front_of, hypervolumes
from launch.sweep_data import (
    DeviceReport,
    Estimate,
    Gate,
    LatencyReport,
    Limit,
    Objective,
    Pick,
    Predictor,
    Ranking,
    SweepRecord,
    TrialRecord,
)
from modeling.config import ModelConfig
from search.space import Limits, Space

LOSS = Objective(name="loss", label="held-out loss", reference=2.65)
TTFT = Objective(name="ttft_ms", label="time to first token", unit="ms", reference=5000.0)
DECODE = Objective(name="decode_tok_s", label="decoding rate", unit="tokens/s", direction="max", reference=10.0)
FOUR_SECONDS = Limit(name="ttft_ms", label="time to first token", unit="ms", value=4000.0)
REASONS = (("failed", "bad_output: the checksum of its tokens differs"), ("infeasible", "oom: killed at 3.1 GiB"),
           ("infeasible", "timeout: no answer in 120 s (the second time)"))  # fmt: skip


def demo_space() -> Space:
    return Space(
        choices={"num_layers": (8, 10, 12, 14, 16), "hidden_size": tuple(range(512, 1537, 128)),
                 "ffn_size": tuple(range(1024, 5121, 512)), "num_heads": (8, 16), "num_kv_heads": (2, 4, 8), "head_dim": (64,),
                 "block_repeat": (1, 2)},
        fixed={"vocab_size": 32000, "max_positions": 4096, "window": 256}, limits=Limits(memory_bytes=900_000_000),
    )  # fmt: skip


def true_values(model: ModelConfig) -> dict[str, float]:
    """Time and rate from operations and bytes; loss from parameters, depth and missing attention. Constants are made up."""
    kinds = model.attention_kinds
    flops = 2048 * model.flops_per_token(1024)
    size = model.num_params() - model.vocab_size * model.hidden_size
    loss = 1.9 + 190.0 / size**0.34 + 0.5 / model.num_executed_layers
    loss += sum({"full": 0.0, "window": 0.004, "skip": 0.009}[kind] for kind in kinds)
    return {"loss": loss, "ttft_ms": 60 + flops / 3.2e8, "decode_tok_s": 9e9 / (model.weight_bytes(4, 32) * model.block_repeat)}


def demo_trials(count: int, seed: int = 0, failing: float = 0.12) -> list[TrialRecord]:
    draw, space, trials = random.Random(seed), demo_space(), []
    for number, candidate in enumerate(space.sample(draw, count)):
        model = space.to_config(candidate)
        common = {"number": number, "key": space.key(candidate), "config": asdict(model)}
        if draw.random() < failing:
            state, reason = draw.choice(REASONS)
            trials.append(TrialRecord(**common, state=state, reason=reason))
            continue
        true = true_values(model)
        noise = {"loss": 0.008, "ttft_ms": 0.01 * true["ttft_ms"]}
        results = {name: value + noise.get(name, 0.0) * draw.gauss(0, 1) for name, value in true.items()}
        predicted = {"ttft_ms": true["ttft_ms"] * math.exp(draw.gauss(0, 0.03))}
        trials.append(TrialRecord(**common, state="ok", results=results, noise=noise, predicted=predicted, fidelity="device"))
    return trials


def demo_latency(trials: list[TrialRecord]) -> LatencyReport:
    pairs = tuple((trial.results["ttft_ms"], trial.predicted["ttft_ms"]) for trial in trials if trial.results)
    gates = (Gate(name="r2", value=0.984, low=0.97, high=1.0), Gate(name="mape", value=2.6, low=0.0, high=5.0),
             Gate(name="within_10", value=99.2, low=90.0, high=100.0), Gate(name="spearman", value=0.991, low=0.97, high=1.0),
             Gate(name="coverage", value=88.0, low=90.0, high=99.0))  # fmt: skip
    proxies = (Predictor(name="parameters", spearman=0.81, kendall=0.62), Predictor(name="flops", spearman=0.93, kendall=0.79))
    model = Predictor(name="linear+gp", r2=0.984, mape=2.6, within_10=99.2, spearman=0.991, kendall=0.934, coverage=88.0)
    return LatencyReport(metric=TTFT, model=model, readings=len(pairs), passed=False, gates=gates, proxies=proxies, pairs=pairs)


def demo_devices() -> tuple[DeviceReport, ...]:
    return (
        DeviceReport(name="phone-a", device_class="phone", fidelity="device", measured=131, utilisation=0.83,
                     failures={"timeout": 2, "throttled": 5}, drift=(0.0, 0.004, 0.011, -0.006, 0.013, 0.008)),
        DeviceReport(name="phone-b", device_class="phone", fidelity="device", state="quarantined", measured=58,
                     utilisation=0.41, reason="its sentinel was off twice, by +9.1 % at last", failures={"hot": 7, "lost": 3},
                     drift=(0.0, 0.013, 0.031, 0.068, 0.091), quarantines=2))  # fmt: skip


def demo_record(count: int = 120, seed: int = 0, objectives: tuple[Objective, ...] = (LOSS, TTFT)) -> SweepRecord:
    """A finished search of `count` trials."""
    trials = demo_trials(count, seed)
    if count > 30:  # a proposal that was made before
        trials[20] = replace(trials[3], number=20, duplicate_of=3)
    record = SweepRecord(
        name="phone-night", objectives=objectives, limits=(FOUR_SECONDS,), fidelity="device", phase="done",
        trials=tuple(trials), latency=(demo_latency(trials),), devices=demo_devices(), space_size=demo_space().size(),
        events={"sentinel": 11, "drift": 2, "quarantined": 2, "late_answer": 1, "put_back": 9})  # fmt: skip
    front = front_of(record)
    draw = random.Random(seed + 1)
    losses = [trial.results["loss"] for trial in record.judged()[:20] if trial.results]
    ranking = Ranking(metric=LOSS, kendall=0.79, spearman=0.92,
                      pairs=tuple((loss, loss - 0.4 + draw.gauss(0, 0.02)) for loss in losses))  # fmt: skip
    picks = []
    for point in front[:2]:
        results = trials[point.trial].results or {}
        time = results["ttft_ms"]
        picks.append(Pick(trial=point.trial, path=f"exports/pick-{point.trial}/recipe.toml", why="the knee of the front",
                          expected={"ttft_ms": Estimate(value=time, low=0.96 * time, high=1.04 * time),
                                    "loss": Estimate(value=results["loss"])},
                          measured={"ttft_ms": 1.021 * time, "loss": results["loss"] - 0.41}))  # fmt: skip
    front = tuple(replace(point, confirmed=place % 2 == 0) for place, point in enumerate(front))
    return replace(record, front=front, hypervolume=hypervolumes(record), ranking=ranking, picks=tuple(picks))
