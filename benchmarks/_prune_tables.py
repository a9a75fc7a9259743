"""What `prune_ranking.py` says of its losses: rank agreement, what noise allows, what disagreement goes with."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from modeling.config import ModelConfig
from search.quality import kendall_tau

Row = Mapping[str, Any]
"""One candidate: its name, shape, parameters, flops, losses from scratch (`scratch`), pruned (`pruned`) and after each
short training (`short`: recipe -> loss, `short_tokens`: recipe -> tokens)."""


def describe(candidate: ModelConfig) -> str:
    kinds = "".join(kind[0] for kind in candidate.attention_kinds)
    return f"d{candidate.hidden_size} f{candidate.ffn_size} h{candidate.num_heads}/{candidate.num_kv_heads} {kinds}"


def shape(candidate: ModelConfig) -> dict[str, float]:
    """The properties that a disagreement may go with; widths in logarithms, since losses follow those."""
    skipped = sum(kind == "skip" for kind in candidate.attention_kinds)
    return {
        "blocks": candidate.num_layers, "blocks that attend": candidate.num_layers - skipped, "blocks that skip": skipped,
        "log width": math.log(candidate.hidden_size), "log FFN": math.log(candidate.ffn_size),
        "heads": candidate.num_heads, "KV heads": candidate.num_kv_heads, "log parameters": math.log(candidate.num_params()),
    }  # fmt: skip


def noise_of(pairs: Sequence[tuple[float, float]]) -> float:
    """Standard deviation of one training from scratch over seeds, from pairs that differ in the seed alone."""
    return math.sqrt(sum((one - other) ** 2 for one, other in pairs) / (2 * len(pairs)))


def reachable_tau(scratch: Sequence[float], noise: float, draws: int = 1000) -> float:
    """Mean tau that a perfect score would have with one noisy training a candidate.

    The true losses are taken to spread as the measured ones do less the noise's variance; 0 where that leaves nothing.
    """
    mean, variance = statistics.mean(scratch), statistics.variance(scratch)
    if noise**2 >= variance:
        return 0.0
    shrink = math.sqrt(1 - noise**2 / variance)
    true = [mean + (loss - mean) * shrink for loss in scratch]
    draw = random.Random(0)
    return statistics.mean(kendall_tau(true, [loss + draw.gauss(0, noise) for loss in true]) for _ in range(draws))


def jackknife(one: Sequence[float], other: Sequence[float]) -> float:
    """Standard error of tau over candidates: how far it moves when each is left out in turn."""
    count = len(one)
    left = [kendall_tau([*one[:i], *one[i + 1 :]], [*other[:i], *other[i + 1 :]]) for i in range(count)]
    mean = statistics.mean(left)
    return math.sqrt((count - 1) / count * sum((tau - mean) ** 2 for tau in left))


def correlations(short: Sequence[float], scratch: Sequence[float], shapes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Pearson's r of each property with what is left of the short loss after a straight line in the loss from scratch.

    Positive: the short training thinks less of candidates with more of it than training from scratch does. Properties that
    do not vary are left out.
    """
    slope, start = statistics.linear_regression(scratch, short)
    rest = [one - start - slope * other for one, other in zip(short, scratch, strict=True)]
    columns = {name: [item[name] for item in shapes] for name in shapes[0]}
    return {name: statistics.correlation(rest, column) for name, column in columns.items() if len(set(column)) > 1}


def ranking_lines(rows: Sequence[Row], tokens: int) -> list[str]:
    scratch = [row["scratch"] for row in rows]
    lines = ["", f"{len(rows)} candidates against {tokens} tokens from scratch: tau (its standard error), mean loss, tokens",
             f"  {'from scratch':<34}{'':>13}{statistics.mean(scratch):>8.3f}{tokens:>9}"]  # fmt: skip
    for recipe in rows[0]["short"]:
        short = [row["short"][recipe] for row in rows]
        lines.append(f"  {recipe:<34}{_tau(short, scratch)}{statistics.mean(short):>8.3f}{rows[0]['short_tokens'][recipe]:>9}")
    pruned = [row["pruned"] for row in rows]
    lines.append(f"  {'pruned, not trained':<34}{_tau(pruned, scratch)}{statistics.mean(pruned):>8.3f}")
    for name, label in (("parameters", "parameters alone"), ("flops", "FLOPs alone")):
        lines.append(f"  {label:<34}{_tau([-row[name] for row in rows], scratch)}")
    return lines


def _tau(values: Sequence[float], scratch: Sequence[float]) -> str:
    return f"{kendall_tau(values, scratch):>6.2f} ({jackknife(values, scratch):.2f})"


def noise_lines(rows: Sequence[Row], pairs: Sequence[tuple[float, float]]) -> list[str]:
    scratch = [row["scratch"] for row in rows]
    noise = noise_of(pairs)
    return ["", f"{len(pairs)} candidates from scratch with another seed: standard deviation {noise:.4f}, where losses of all "
                f"candidates have {statistics.stdev(scratch):.4f}",
            f"  a perfect score would have tau {reachable_tau(scratch, noise):.2f}"]  # fmt: skip


def residual_lines(rows: Sequence[Row]) -> list[str]:
    scratch, shapes = [row["scratch"] for row in rows], [row["shape"] for row in rows]
    scores = [[row["short"][recipe] for row in rows] for recipe in rows[0]["short"]]
    scores.append([-item["log parameters"] for item in shapes])
    found = [correlations(score, scratch, shapes) for score in scores]
    lines = ["", "what disagreement goes with (r; above 0: the score thinks less of more of it), by recipe as above, then size"]
    lines += [f"  {name:<20}" + "".join(f"{item[name]:>7.2f}" for item in found) for name in found[0]]
    return lines


def candidate_lines(rows: Sequence[Row]) -> list[str]:
    """Every candidate, best from scratch first."""
    lines = ["", "candidate, parameters, pruned, after each short training, from scratch"]
    for row in sorted(rows, key=lambda row: row["scratch"]):
        short = "".join(f"{loss:>8.3f}" for loss in row["short"].values())
        lines.append(f"  {row['candidate']:<24}{row['parameters']:>8}{row['pruned']:>8.3f}{short}{row['scratch']:>8.3f}")
    return lines


def ablation_lines(rows: Sequence[Row]) -> list[str]:
    titles = {"variant": "widths pruned, all blocks kept", "layers": "4, 3, 2 of 5 blocks kept",
              "share": "2 blocks and 1, each run twice"}
    lines, last = [], None
    for row in rows:
        if row["choice"] != last:
            last = row["choice"]
            lines += ["", f"{titles[last]}, mean of {row['candidates']}: held-out loss after pruning, after short training"]
        lines.append(f"  {row['value']:<12}{row['pruned']:>8.3f}{row['short']:>8.3f}")
    return lines
