"""Does a short training of a pruned backbone rank candidates as training from scratch does, and which importance is best?

    python benchmarks/prune_ranking.py                       # 20 candidates
    python benchmarks/prune_ranking.py --folder DIR          # keeps (and goes on from) what was trained

A backbone of 0.3M parameters is trained on the quickstart's text (POCKETFORGE_DATA, else Python's own library) and
calibrated. Candidates of different depth, widths, heads and attention are trained from random weights, and cut out of the
backbone and trained on for a fraction of that, by each recipe of `_prune_setup.SHORT`. Printed: Kendall's tau between the
held-out losses (aim 0.7, as MobileLLM-Flash found), beside tau of parameters and of FLOPs and the tau that the noise of
training from scratch leaves to be had; what disagreement goes with; and for every importance variant the loss right after
pruning and after the short training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

TESTS = ("tests/modeling/test_prune.py", "tests/stages/test_importance.py", "tests/launch/test_search_quality.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--backbone-steps", type=int, default=3000)
    parser.add_argument("--scratch-steps", type=int, default=600)
    parser.add_argument("--short-steps", type=int, default=60)
    parser.add_argument("--recipes", type=int, help="how many of the short trainings' recipes, from the first; default: all")
    parser.add_argument("--repeated", type=int, default=3, help="candidates trained from scratch with a second seed")
    parser.add_argument("--ablated", type=int, default=3, help="candidates whose short training is repeated for every variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep everything here; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="also write every result to this JSON file")
    options = parser.parse_args()
    if min(options.candidates, options.repeated, options.ablated) < 1 or options.candidates < max(3, options.repeated):
        parser.error(f"--candidates {options.candidates} --repeated {options.repeated} --ablated {options.ablated}: expected "
                     "at least 3 candidates, as many as are repeated, and 1 of the others")  # fmt: skip
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    with tempfile.TemporaryDirectory(prefix="prune_ranking_") as temporary:
        results = measure(options.folder or Path(temporary), options)
    if options.output:
        from launch.rundir import write_json

        write_json(options.output, {"conditions": train_step.conditions(), **results})
    return 0


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Everything, each table written as soon as it is known; the other recipes come last."""
    from benchmarks import _prune_setup as tiny
    from benchmarks import _prune_tables as tables

    clock, tokens = time.perf_counter(), options.scratch_steps * tiny.STEP_TOKENS
    setup = tiny.prepare(folder, options.backbone_steps, options.threads)
    candidates = tiny.draw_candidates(options.candidates, options.seed)
    train_step.note(f"backbone ready after {time.perf_counter() - clock:.0f} s")
    rows, recipes = from_scratch(setup, candidates, options), list(tiny.SHORT)[: options.recipes]
    train_short(setup, candidates, rows, recipes[:1], options)
    pairs = repeat(setup, candidates, rows, options)
    say([f"{key}: {value}" for key, value in train_step.conditions().items()])
    say(tables.ranking_lines(rows, tokens) + tables.noise_lines(rows, pairs))
    ablation = ablate(setup, candidates, options)
    say(tables.ablation_lines(ablation))
    train_short(setup, candidates, rows, recipes[1:], options)
    say([*tables.ranking_lines(rows, tokens), *tables.residual_lines(rows), *tables.candidate_lines(rows),
         f"in {time.perf_counter() - clock:.0f} s"])  # fmt: skip
    return {"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows, "pairs": pairs, "ablation": ablation}


def say(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def from_scratch(setup, candidates: Sequence, options: argparse.Namespace) -> list[dict[str, Any]]:  # type: ignore[no-untyped-def]
    """A row a candidate (`_prune_tables.Row`), as yet without short trainings."""
    from benchmarks import _prune_setup as tiny
    from benchmarks._prune_tables import describe, shape

    rows: list[dict[str, Any]] = []
    for candidate in candidates:
        full = setup.scratch()(candidate, options.scratch_steps * tiny.STEP_TOKENS, options.seed)
        rows.append({"candidate": describe(candidate), "shape": shape(candidate), "parameters": candidate.num_params(),
                     "flops": candidate.flops_per_token(tiny.LENGTH), "scratch": full.loss, "short": {},
                     "short_tokens": {}})  # fmt: skip
        train_step.note(f"{len(rows)}/{len(candidates)} {describe(candidate)} from scratch: {full.loss:.3f}")
    return rows


def train_short(  # type: ignore[no-untyped-def]
    setup, candidates: Sequence, rows: Sequence[dict], recipes: Sequence[str], options: argparse.Namespace
) -> None:
    """Adds to the rows what each recipe's short training gives."""
    from benchmarks import _prune_setup as tiny

    for name in recipes:
        recipe = tiny.SHORT[name]
        for row, candidate in zip(rows, candidates, strict=True):
            quick = setup.short(recipe)(candidate, recipe.steps(options.short_steps) * tiny.STEP_TOKENS, options.seed)
            row["pruned"], row["short"][name], row["short_tokens"][name] = quick.start_loss, quick.loss, quick.tokens
            train_step.note(f"{name}, {row['candidate']}: {quick.start_loss:.3f}, then {quick.loss:.3f}")


def repeat(setup, candidates: Sequence, rows: Sequence[dict], options: argparse.Namespace) -> list[tuple[float, float]]:  # type: ignore[no-untyped-def]
    """Losses from scratch with the first seed and with another, of candidates that are spread over the sizes."""
    from benchmarks import _prune_setup as tiny

    order = sorted(range(len(candidates)), key=lambda index: rows[index]["parameters"])
    last = len(order) - 1
    chosen = [order[round(last * i / max(1, options.repeated - 1))] for i in range(options.repeated)]
    pairs = []
    for index in chosen:
        again = setup.scratch()(candidates[index], options.scratch_steps * tiny.STEP_TOKENS, options.seed + 1)
        pairs.append((rows[index]["scratch"], again.loss))
        train_step.note(f"second seed, {rows[index]['candidate']}: {pairs[-1][0]:.3f}, {pairs[-1][1]:.3f}")
    return pairs


def ablate(setup, candidates: Sequence, options: argparse.Namespace) -> list[dict]:  # type: ignore[no-untyped-def]
    """Every variant over the same candidates: loss right after pruning, and after the first recipe's short training."""
    from benchmarks import _prune_setup as tiny
    from stages.importance import LAYER_SCORES, VARIANTS

    few, backbone = candidates[: options.ablated], setup.recipe.model
    wide = [replace(candidate, num_layers=backbone.num_layers, attention=()) for candidate in few]
    deep = [replace(backbone, num_layers=layers) for layers in (4, 3, 2)]
    shared = [replace(backbone, num_layers=layers, block_repeat=2) for layers in (2, 1)]
    plans: list[tuple[str, str, list]] = [
        *(("variant", variant, wide) for variant in VARIANTS), *(("layers", score, deep) for score in LAYER_SCORES),
        *(("share", share, shared) for share in ("first", "best", "mean")),
    ]  # fmt: skip
    recipe, found = next(iter(tiny.SHORT.values())), []
    for field, value, models in plans:
        training = setup.short(recipe, **{field: value})
        scores = [training(model, recipe.steps(options.short_steps) * tiny.STEP_TOKENS, options.seed) for model in models]
        found.append({"choice": field, "value": value, "candidates": len(models),
                      "pruned": statistics.mean(score.start_loss for score in scores),
                      "short": statistics.mean(score.loss for score in scores)})  # fmt: skip
        train_step.note(f"{field} {value}: {found[-1]['pruned']:.3f}, then {found[-1]['short']:.3f}")
    return found


if __name__ == "__main__":
    sys.exit(main())
