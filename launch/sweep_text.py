"""What a search came to, in words and in numbers that read well."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import Literal

from launch.page import DASH, count
from launch.sweep_data import LatencyReport, Limit, Metric, SweepRecord, TrialRecord
from modeling.config import ModelConfig
from search.alarms import LIMIT

FIDELITIES = {
    "device": "measured on the device",
    "host": "measured on this machine, not on a phone",
    "emulated": "run in an emulator, where times mean nothing",
    "analytic": "calculated by a model of a device, not measured",
}
STATES = ("waiting", "running", "infeasible", "failed", "cancelled")
"""Of trials that are not ok, in the order in which they are told."""
GATE_NAMES = {"r2": "R\N{SUPERSCRIPT TWO}", "mape": "mean error, %", "within_10": "within 10 %, % of readings",
              "spearman": "Spearman", "kendall": "Kendall", "coverage": "inside the 95 % band, %"}  # fmt: skip
FITTED = ("ms", "bytes", "")
"""Units that change with the size of a value; others may stand in a column's head."""
_LETTERS = {"full": "F", "window": "w", "skip": "\N{MIDDLE DOT}"}


def quantity(value: float | None, metric: Metric) -> str:
    """3.42 s, 312 ms, 18.4 MiB, 2.413: in the unit that fits the value; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    factor, unit = scale_of(metric, abs(value))
    scaled = value * factor
    text = f"{scaled:,.4g}" if abs(scaled) < 1000 else f"{scaled:,.0f}"
    return f"{text} {unit}".rstrip()


def interval(ends: tuple[float, float], metric: Metric) -> str:
    """3.31 to 3.52 s: both ends in the unit that fits the larger."""
    factor, unit = scale_of(metric, max(abs(end) for end in ends))
    return f"{ends[0] * factor:,.4g} to {ends[1] * factor:,.4g} {unit}".rstrip()


def percent(share: float, *, sign: bool = False) -> str:
    rounded = round(100 * share, 1) + 0.0  # no -0.0
    return f"{rounded:+.1f} %" if sign and rounded else f"{rounded:.1f} %"


def scale_of(metric: Metric, largest: float) -> tuple[float, str]:
    """(factor, unit) in which values up to `largest` are shown."""
    if metric.unit == "ms" and largest >= 1000:
        return 1e-3, "s"
    if metric.unit == "bytes":
        return next(((1 / size, unit) for size, unit in ((2.0**30, "GiB"), (2.0**20, "MiB")) if largest >= size),
                    (2.0**-10, "KiB"))  # fmt: skip
    return 1.0, metric.unit


def volume_scale(record: SweepRecord) -> tuple[float, str]:
    """(factor, unit) of the hypervolume, from the units in which the references are shown."""
    scales = [scale_of(goal, abs(goal.reference)) for goal in record.objectives]
    return math.prod(factor for factor, _ in scales), " \N{MULTIPLICATION SIGN} ".join(unit for _, unit in scales if unit)


def limit_words(limit: Limit) -> str:
    bound = "\N{LESS-THAN OR EQUAL TO}" if limit.direction == "min" else "\N{GREATER-THAN OR EQUAL TO}"
    return f"{limit.words} {bound} {quantity(limit.value, limit)}"


def pattern(trial: TrialRecord) -> str:
    """A letter a stored block: F full, w window, a dot without attention."""
    model = trial.model()
    return "".join(_LETTERS[kind] for kind in model.attention_kinds) if model else "?"


def shape(trial: TrialRecord) -> str:
    """12 layers, width 640, FFN 2048, 10/5 heads of 64; of a mixture also: 60 experts of 256, 4 a token, shared 1024."""
    model = trial.model()
    if model is None:
        return "its stored config is no model's"
    repeat = f" \N{MULTIPLICATION SIGN} {model.block_repeat}" if model.block_repeat > 1 else ""
    return (f"{model.num_layers}{repeat} layers, width {model.hidden_size}, FFN {model.ffn_size}, "
            f"{model.num_heads}/{model.num_kv_heads} heads of {model.head_dim}{experts(model)}")  # fmt: skip


def experts(model: ModelConfig) -> str:
    """To be set behind the sizes of a model: nothing for a dense one."""
    moe = model.moe
    if moe is None:
        return ""
    shared = f", shared {moe.shared_size}" if moe.shared_size else ""
    dense = f", the first {plural(moe.dense_layers, 'layer')} dense" if moe.dense_layers else ""
    return f", {plural(moe.num_experts, 'expert')} of {moe.expert_size}, {moe.top_k} a token{shared}{dense}"


def usable(report: LatencyReport) -> str:
    """usable; or not good enough, and which figures are not."""
    wrong = [f"{GATE_NAMES.get(gate.name, gate.name)} {DASH if gate.value is None else format(gate.value, '.3g')} "
             f"(wanted {gate.low:g} to {gate.high:g})" for gate in report.gates if not gate.passed]  # fmt: skip
    return "usable" if report.passed else ": ".join(["not good enough", *([", ".join(wrong)] if wrong else [])])


def tried_words(record: SweepRecord, metric: Metric) -> tuple[str, bool]:
    """(how far predictions of trials were off, whether any by more than an alarm's limit); nothing where none was predicted."""
    misses = record.tried(metric.name)
    if not misses:
        return "", False
    worst = max(misses, key=lambda miss: abs(miss.off))
    over = sum(abs(miss.off) > LIMIT for miss in misses)
    words = (f"{plural(len(misses), 'trial')}: median {100 * median(abs(miss.off) for miss in misses):.2g} % off, worst "
             f"{100 * worst.off:+.2g} % (trial {worst.trial})")  # fmt: skip
    return words + (f", {over} more than {100 * LIMIT:g} % off" if over else ""), over > 0


@dataclass(frozen=True)
class Verdict:
    """One line, what it rests on, and whether it is what was wanted."""

    headline: str
    detail: str
    tone: Literal["good", "bad", "none"]


def verdict(record: SweepRecord) -> Verdict:
    """What the search came to."""
    judged, within, states = record.judged(), record.within(), Counter(trial.state for trial in record.trials)
    judged = [trial for trial in judged if not trial.short] or judged
    if not record.trials:
        return Verdict("No model has been tried yet.", f"The search is in its phase {record.phase!r}.", "none")
    if not judged:
        return _none_judged(record, states)
    if not within:
        limits = " and ".join(limit_words(limit) for limit in record.limits)
        return Verdict(f"None of the {plural(len(judged), 'judged model')} keeps {limits}.", _closest(record, judged), "bad")
    goal = record.objectives[0]
    best = best_of(record, within)[0]
    value = best.values()[goal.name]
    if not record.limits:
        headline = (f"{len(record.front)} of {plural(len(judged), 'judged model')} make the front; "
                    f"the best has {goal.words} {quantity(value, goal)}.")  # fmt: skip
        return Verdict(headline, f"It is trial {best.number}: {shape(best)}.", "good")
    limits = " and ".join(limit_words(limit) for limit in record.limits)
    met = "models keep" if len(within) > 1 else "model keeps"
    headline = f"{len(within)} of {len(judged)} {met} {limits}; the best has {goal.words} {quantity(value, goal)}."
    detail = f"It is trial {best.number}: {shape(best)}. {_price(record, judged, value)}{_estimated(record, within)}"
    return Verdict(headline, detail, "good")


def best_of(record: SweepRecord, trials: list[TrialRecord]) -> list[TrialRecord]:
    """Judged trials, the best in the first objective first."""
    goal = record.objectives[0]
    return sorted(trials, key=lambda trial: (goal.sign * trial.values()[goal.name], trial.number))


def _none_judged(record: SweepRecord, states: Counter[str]) -> Verdict:
    going = states["running"] + states["waiting"]
    reasons = Counter(trial.reason for trial in record.trials if trial.reason).most_common(1)
    why = f" The most frequent reason, {reasons[0][1]} times: {reasons[0][0]}" if reasons else ""
    ended = ", ".join(f"{states[state]} {state}" for state in ("failed", "infeasible", "cancelled", "ok") if states[state])
    if going:
        return Verdict("No model has been judged yet.", f"{going} are under way{'; ' + ended if ended else ''}.{why}", "none")
    return Verdict(f"None of the {plural(len(record.trials), 'model')} tried could be judged.", f"{ended}.{why}", "bad")


def _closest(record: SweepRecord, judged: list[TrialRecord]) -> str:
    """Of each limit that nobody keeps, how near it anyone came."""
    found = []
    for limit in record.limits:
        values = [trial.values()[limit.name] for trial in judged if limit.name in trial.values()]
        if not values:
            found.append(f"No trial has a value of {limit.words}.")
        elif not any(limit.sign * value <= limit.sign * limit.value for value in values):
            best = min(values, key=lambda value: limit.sign * value)
            found.append(f"The closest has {quantity(best, limit)} of {limit.words}.")
    return " ".join(found) or "Each limit is kept by some model, all of them by none."


def _price(record: SweepRecord, judged: list[TrialRecord], value: float) -> str:
    """What the limits cost: the best of all against the best that keeps them."""
    goal = record.objectives[0]
    best = best_of(record, judged)[0]
    other = best.values()[goal.name]
    if len(record.within()) == len(judged):
        return ""
    if other == value:
        return "No judged model that breaks a limit is better."
    them, what = ("it", "the limit costs") if len(record.limits) == 1 else ("them", "the limits cost")
    cost = f": {what} {percent(abs(value / other - 1))}" if other else ""
    return f"Without {them} the best is trial {best.number} with {quantity(other, goal)}{cost}."


def _estimated(record: SweepRecord, within: list[TrialRecord]) -> str:
    number = sum(not record.measured(trial) for trial in within)
    return f" Of {number} of the {len(within)} this is predicted, not measured." if number else ""


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def facts(record: SweepRecord) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the facts under the title; only those that are known."""
    states = Counter(trial.state for trial in record.trials)
    duplicates = sum(trial.duplicate_of is not None for trial in record.trials)
    parts = [f"{len(record.judged())} judged", *(f"{states[state]} {state}" for state in STATES if states[state]),
             *([f"{duplicates} proposed twice"] if duplicates else [])]  # fmt: skip
    found = [("Trials", f"{len(record.trials):,}", ", ".join(parts))]
    confirmed = sum(point.confirmed for point in record.front)
    detail = f"{confirmed} confirmed by a second measurement" if confirmed else "not confirmed yet"
    gone = f", {len(record.dropped)} dropped by it" if record.dropped else ""
    found.append(("Front", plural(len(record.front), "model"), detail + gone if record.front or gone else ""))
    if record.hypervolume:
        factor, unit = volume_scale(record)
        below = ", ".join(f"{goal.words} {quantity(goal.reference, goal)}" for goal in record.objectives)
        found.append(("Hypervolume", f"{factor * record.hypervolume[-1]:,.4g} {unit}".rstrip(), f"reference: {below}"))
    for report in record.needed_models():
        figures = [f"R\N{SUPERSCRIPT TWO} {report.model.r2:.3f}" if report.model.r2 is not None else "",
                   f"{report.model.mape:.2g} % off on average" if report.model.mape is not None else ""]
        found.append((f"Model of {report.metric.words}", "usable" if report.passed else "not good enough",
                      ", ".join(part for part in (*figures, plural(report.readings, "reading")) if part)))
    if record.space_size is not None:
        found.append(("Space", f"{large(record.space_size)} models", "after the hard filters"))
    if record.devices or record.fidelity:
        found.append(("Devices", ", ".join(device.name for device in record.devices) or DASH,
                      FIDELITIES.get(record.fidelity, record.fidelity)))
    return found


def large(value: int) -> str:
    """As `count`, and in powers of ten from a thousand billions on."""
    return count(value) if value < 10**15 else f"{value:.2g}".replace("e+", " \N{MULTIPLICATION SIGN} 10^")
