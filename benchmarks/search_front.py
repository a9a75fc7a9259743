"""How much of a known front the optimizers find: share of the hypervolume at 50, 100, 200 evaluations, median over seeds.

    python benchmarks/search_front.py                                  staged, with a latency stage, three variants, 5 seeds
    python benchmarks/search_front.py --arm nsga2 --variant flash      another optimizer
    python benchmarks/search_front.py --no-latency-stage --failures 0.15
    python benchmarks/search_front.py --variant random2                another problem for each number, names, sizes and all
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # started as a script, not as a module

from benchmarks._flash_like import LOSS_NOISE, OUTLIERS, REFERENCE, TIME_NOISE, VARIANTS, Problem  # noqa: E402
from benchmarks._flash_random import random_problem  # noqa: E402

MARKS = (50, 100, 200)
BATCH = 8


class Noise:
    """Of one run: what an evaluation and a latency reading really say."""

    def __init__(self, problem: Problem, seed: int, failures: float) -> None:
        self.problem, self.failures = problem, failures
        self.draw = np.random.default_rng([seed, 12345])
        self.readings = 0

    def _time(self, truth: float) -> float:
        slip = 1 + self.draw.uniform(0.1, 0.6) if self.draw.random() < OUTLIERS else 1.0
        return truth * float(np.exp(TIME_NOISE * self.draw.standard_normal())) * slip

    def evaluate(self, config: dict[str, Any]) -> dict[str, float] | None:
        if self.draw.random() < self.failures:
            return None
        ttft, loss = self.problem.evaluate(config)
        return {"ttft": self._time(ttft), "loss": loss + LOSS_NOISE * float(self.draw.standard_normal())}

    def measure_latency(self, config: dict[str, Any]) -> float:
        self.readings += 1
        return self._time(self.problem.evaluate(config)[0])


def find_problem(name: str) -> Problem:
    """A variant, or `randomN`. Raises ArgumentTypeError, which argparse tells in a line."""
    if name.startswith("random") and name[6:].isdecimal():
        return random_problem(int(name[6:]))
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{name!r} is no problem; expected {', '.join(sorted(VARIANTS))} or random0 ...")
    return VARIANTS[name]


def make(arm: str, problem: Problem, seed: int, noise: Noise, stage: bool) -> Any:
    """An optimizer with ask and tell."""
    if arm == "staged":
        from search.bench_adapter import factory

        return factory(problem.space, REFERENCE, seed, noise.measure_latency if stage else None, problem.repair)
    from search.optim.base import Domain, Goal
    from search.optim.catalog import make_optimizer

    return make_optimizer(arm, Domain(choices=problem.space, repair=problem.repair), Goal(objectives=REFERENCE), seed)


def run(
    arm: str, problem: Problem, seed: int, evaluations: int, failures: float, stage: bool, batch: int = BATCH
) -> dict[str, Any]:
    """Shares at the marks, CPU seconds of the slowest ask, readings."""
    noise = Noise(problem, seed, failures)
    search = make(arm, problem, seed, noise, stage)
    found: list[tuple[float, float]] = []
    shares, slowest, total, told = {}, 0.0, 0.0, 0
    while told < evaluations:
        start = time.process_time()
        asked = search.ask(min(batch, evaluations - told))
        spent = time.process_time() - start
        total, slowest = total + spent, max(slowest, spent) if told else slowest
        for token, config in asked:
            values = noise.evaluate(config)
            search.tell(token, values)
            told += 1
            if values is not None:
                found.append(problem.evaluate(config))
            if told in MARKS:
                shares[told] = problem.share(found)
    return {"seed": seed, "shares": shares, "slowest_ask_cpu_s": round(slowest, 2), "cpu_s": round(total, 1),
            "readings": noise.readings}  # fmt: skip


def main() -> None:
    """Prints one line a variant; `--output` keeps every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", default="staged", help="staged, botorch, tpe, optuna-nsga2, nsga2 or random")
    parser.add_argument("--variant", type=find_problem, action="append",
                        help=f"{', '.join(sorted(VARIANTS))} (all of them by default), or random0 ...; may be repeated")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=BATCH, help="questions at a time")
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--failures", type=float, default=0.0, help="share of evaluations that fail")
    parser.add_argument("--no-latency-stage", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    kept = []
    for problem in arguments.variant or [VARIANTS[name] for name in sorted(VARIANTS)]:
        runs = [run(arguments.arm, problem, seed, arguments.evaluations, arguments.failures, not arguments.no_latency_stage,
                    arguments.batch)
                for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds)]  # fmt: skip
        kept += [{"variant": problem.name, "arm": arguments.arm, **result} for result in runs]
        columns = []
        for mark in MARKS:
            if at := [result["shares"][mark] for result in runs if mark in result["shares"]]:
                columns.append(f"{mark}: {statistics.median(at):.3f} ({min(at):.3f}..{max(at):.3f})")
        slowest, cost = max(r["slowest_ask_cpu_s"] for r in runs), statistics.median(r["cpu_s"] for r in runs)
        print(f"{arguments.arm} {problem.name} (front of {len(problem.true_front)}, {len(runs)} seeds)  {'  '.join(columns)}  "
              f"slowest ask {slowest} CPU-s, CPU {cost:.0f} s, readings {max(r['readings'] for r in runs)}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
