"""From readings to the tables of `latency_model.py`: figures on held-out architectures, proxies, repeatability, transfer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._latency_readings import Clock, Read, Setting, configs_of, gates_met, load
from modeling.config import ModelConfig
from search.latency.gates import errors
from search.latency.model import LatencyModel
from search.latency.reading import Key
from search.latency.transfer import transfer
from search.metrics import KINDS, UNITS

Array = NDArray[np.float64]
AIMS = {"r2": 0.98, "mape": 4.0, "kendall": 0.93}
COLUMNS = ("r2", "mape", "within_10", "spearman", "kendall", "coverage")
HEADER = f"  {'':<26}{'R2':>8}{'MAPE %':>8}{'in 10 %':>9}{'Spearman':>10}{'Kendall':>9}{'in band':>9}"
PROXIES = ("parameters", "flops", "bytes")
LEAST = 20
"""Readings, and held-out architectures, below which nothing is printed of a setting."""


def key_of(setting: Setting, metric: str, clock: Clock) -> Key:
    return Key(device_class=f"local, {clock} time", runtime="pocketforge", threads=setting.threads, metric=KINDS[metric],
               context=setting.prompt_tokens)  # fmt: skip


def values_of(reads: Sequence[Read]) -> Array:
    return np.array([read.reading.value for read in reads])


def held_out_figures(model: LatencyModel, held: Sequence[Read]) -> dict[str, float]:
    """Of predictions against readings that the model has not seen; coverage: % of them inside the 95 % band."""
    truth, configs = values_of(held), configs_of(held)
    low, high = model.interval(configs)
    return {**errors(truth, model.predict(configs)[0]), "coverage": 100 * float(((low <= truth) & (truth <= high)).mean())}


def proxy(name: str, config: ModelConfig, setting: Setting, metric: str) -> float:
    if name == "parameters":
        return float(config.num_params())
    if name == "flops":
        tokens = 1 if metric == "decode_ms" else setting.prompt_tokens
        return float(config.flops_per_token(setting.prompt_tokens) * tokens)
    return float(config.weight_bytes(4, 32) + config.kv_bytes(setting.prompt_tokens, 8))


def proxy_figures(name: str, setting: Setting, metric: str, train: Sequence[Read], held: Sequence[Read]) -> dict[str, float]:
    """The proxy times one factor, which is fitted to the readings."""
    known, unseen = (np.array([proxy(name, c, setting, metric) for c in configs_of(part)]) for part in (train, held))
    factor = float(np.median(values_of(train) / known))
    return errors(values_of(held), factor * unseen)


def repeatability(held: Sequence[Read], again: Sequence[Read]) -> dict[str, float]:
    """% that the same architecture differs by when it is read again: median size, and median with its sign."""
    first = {read.key: read.reading.value for read in held}
    ratios = np.array([read.reading.value / first[read.key] - 1 for read in again if read.key in first])
    if not len(ratios):
        return {"pairs": 0}
    return {"pairs": len(ratios), "median": 100 * float(np.median(np.abs(ratios))), "mean": 100 * float(np.abs(ratios).mean()),
            "shift": 100 * float(np.median(ratios))}  # fmt: skip


def setting_figures(folder: Path, setting: Setting) -> Iterator[dict[str, Any]]:
    """One dictionary a metric and clock: models of the readings at the gates and of all, proxies, repeatability."""
    for metric in KINDS:
        for clock in clocks(setting, metric):
            parts = load(folder, setting, metric, clock)
            train, held = parts["latency"], parts["held"]
            if len(train) < LEAST or len(held) < LEAST:
                continue
            counts = sorted({min(gates_met(folder, setting) or len(train), len(train)), len(train)})
            models = {count: LatencyModel.fit(key_of(setting, metric, clock), [r.reading for r in train[:count]])
                      for count in counts}  # fmt: skip
            yield {
                "setting": setting.name, "metric": metric, "clock": clock, "unit": UNITS[metric], "held_out": len(held),
                "range": [float(values_of(held).min()), float(values_of(held).max())],
                "models": {count: {"kind": model.kind, "gates": model.report().to_dict(), **held_out_figures(model, held)}
                           for count, model in models.items()},
                "proxies": {name: proxy_figures(name, setting, metric, train, held) for name in PROXIES},
                "mixtures": mixture_figures(models, held), "again": repeatability(held, parts["again"]),
            }  # fmt: skip


def mixture_figures(models: Mapping[int, LatencyModel], held: Sequence[Read]) -> dict[str, Any] | None:
    """Of the held-out mixtures of experts alone, by the model of all readings; None of a space without them."""
    mixed = [read for read in held if read.reading.config.moe is not None]
    return {"count": len(mixed), **held_out_figures(models[max(models)], mixed)} if len(mixed) > 1 else None


def clocks(setting: Setting, metric: str) -> tuple[Clock, ...]:
    return ("processor", "wall") if setting.processor_time and metric != "peak_memory_mib" else ("wall",)


def figures_text(found: dict[str, Any]) -> list[str]:
    """The lines of one metric."""
    low, high = found["range"]
    clock = f", {found['clock']} time" if found["metric"] != "peak_memory_mib" else ""
    lines = [f"{found['metric']}{clock}, {found['setting']}: {found['held_out']} unseen architectures, "
             f"{low:.3g} to {high:.3g} {found['unit']}",
             HEADER]  # fmt: skip
    for count, model in found["models"].items():
        missed = [name for name, aim in AIMS.items() if (model[name] > aim if name == "mape" else model[name] < aim)]
        verdict = f"  misses {', '.join(missed)}" if missed else "  reaches the aims"
        lines.append(_line(f"{count} readings ({model['kind']})", model) + verdict)
    if mixtures := found["mixtures"]:
        lines.append(_line(f"{mixtures['count']} mixtures, {max(found['models'])} readings", mixtures))
    for name, figures in found["proxies"].items():
        lines.append(_line(f"{name}, one factor", figures))
    if found["again"]["pairs"]:
        again = found["again"]
        lines.append(f"  read again: {again['pairs']} architectures, median difference {again['median']:.2f} %, mean "
                     f"{again['mean']:.2f} %, shift {again['shift']:+.2f} %")  # fmt: skip
    return lines


def _line(label: str, figures: dict[str, float]) -> str:
    band = f"{figures['coverage']:>9.0f}" if "coverage" in figures else f"{'':>9}"
    return (f"  {label:<26}{figures['r2']:>8.3f}{figures['mape']:>8.2f}{figures['within_10']:>9.0f}{figures['spearman']:>10.3f}"
            f"{figures['kendall']:>9.3f}{band}")  # fmt: skip


def transfer_figures(folder: Path, old: Setting, new: Setting, counts: Sequence[int]) -> dict[str, Any] | None:
    """From one setting's model of wall time to first token to another's, with few readings; alone the same readings.

    None where too little was read of one of them.
    """
    before, after = (load(folder, setting, "ttft_ms", "wall") for setting in (old, new))
    if min(len(part) for part in (before["latency"], after["latency"], after["held"])) < LEAST:
        return None
    source = LatencyModel.fit(key_of(old, "ttft_ms", "wall"), [read.reading for read in before["latency"]])
    key = key_of(new, "ttft_ms", "wall")
    rows = {}
    for count in (count for count in counts if count <= len(after["latency"])):
        few = [read.reading for read in after["latency"][:count]]
        moved, alone = transfer(source, key, few), LatencyModel.fit(key, few)
        rows[count] = {"kind": moved.kind, "moved": held_out_figures(moved, after["held"]),
                       "alone": held_out_figures(alone, after["held"])}  # fmt: skip
    return {"from": old.name, "to": new.name, "rows": rows}


def transfer_text(found: dict[str, Any]) -> list[str]:
    lines = [f"time to first token from {found['from']} to {found['to']}, by readings of the new one",
             HEADER]  # fmt: skip
    for count, row in found["rows"].items():
        lines.append(_line(f"{count}, moved ({row['kind']})", row["moved"]))
        lines.append(_line(f"{count}, alone", row["alone"]))
    return lines
