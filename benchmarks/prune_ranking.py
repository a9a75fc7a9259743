"""Does a short training of a pruned backbone rank candidates as training from scratch does, and which importance is best?

    python benchmarks/prune_ranking.py                       # 20 candidates
    python benchmarks/prune_ranking.py --folder DIR          # keeps (and goes on from) what was trained

A backbone of 0.3M parameters is trained on the quickstart's text (POCKETFORGE_DATA, else Python's own library) and
calibrated. Candidates of different depth, widths, heads and attention are trained twice: from random weights, and cut out
of the backbone and trained on for a fraction of that. Printed: Kendall's tau between the two held-out losses (aim 0.7, as
MobileLLM-Flash found), beside tau of parameters and of FLOPs; and for every importance variant the loss right after
pruning and after the short training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

TESTS = ("tests/modeling/test_prune.py", "tests/stages/test_importance.py", "tests/launch/test_search_quality.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--backbone-steps", type=int, default=3000)
    parser.add_argument("--scratch-steps", type=int, default=1500)
    parser.add_argument("--short-steps", type=int, default=200)
    parser.add_argument("--ablated", type=int, default=4, help="candidates whose short training is repeated for every variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep everything here; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="also write every result to this JSON file")
    options = parser.parse_args()
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    with tempfile.TemporaryDirectory(prefix="prune_ranking_") as temporary:
        lines, results = measure(options.folder or Path(temporary), options)
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        from launch.rundir import write_json

        write_json(options.output, {"conditions": train_step.conditions(), **results})
    return 0


def measure(folder: Path, options: argparse.Namespace) -> tuple[list[str], dict]:
    from benchmarks import _prune_setup as tiny

    clock = time.perf_counter()
    setup = tiny.prepare(folder, options.backbone_steps, options.threads)
    candidates = tiny.draw_candidates(options.candidates, options.seed)
    train_step.note(f"backbone ready after {time.perf_counter() - clock:.0f} s")
    short, scratch, rows = setup.pruned(), setup.scratch(), []
    for number, candidate in enumerate(candidates):
        quick = short(candidate, options.short_steps * tiny.STEP_TOKENS, options.seed)
        full = scratch(candidate, options.scratch_steps * tiny.STEP_TOKENS, options.seed)
        rows.append({"candidate": describe(candidate), "parameters": candidate.num_params(),
                     "flops": candidate.flops_per_token(tiny.LENGTH), "pruned": quick.start_loss, "short": quick.loss,
                     "scratch": full.loss, "short_seconds": quick.seconds, "scratch_seconds": full.seconds})
        train_step.note(f"{number + 1}/{len(candidates)} {describe(candidate)}: {quick.loss:.3f} against {full.loss:.3f}")
    ablation = ablate(setup, candidates, options, tiny.STEP_TOKENS)
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines += ranking_lines(rows, options) + ablation_lines(ablation)
    lines.append(f"in {time.perf_counter() - clock:.0f} s")
    return lines, {"options": {k: str(v) for k, v in vars(options).items()}, "rows": rows, "ablation": ablation}


def describe(candidate) -> str:  # type: ignore[no-untyped-def]
    kinds = "".join(kind[0] for kind in candidate.attention_kinds)
    return f"d{candidate.hidden_size} f{candidate.ffn_size} h{candidate.num_heads}/{candidate.num_kv_heads} {kinds}"


def ranking_lines(rows: list[dict], options: argparse.Namespace) -> list[str]:
    from search.quality import kendall_tau

    scratch = [row["scratch"] for row in rows]
    lines = ["", f"Kendall tau with the loss of {options.scratch_steps} steps from scratch, {len(rows)} candidates"]
    for name, label in (("short", f"pruned, then {options.short_steps} steps (aim 0.7)"), ("pruned", "pruned, not trained"),
                        ("parameters", "parameters"), ("flops", "FLOPs")):
        sign = -1 if name in ("parameters", "flops") else 1
        lines.append(f"  {label:<34}{kendall_tau([sign * row[name] for row in rows], scratch):>6.2f}")
    share = sum(row["short_seconds"] for row in rows) / sum(row["scratch_seconds"] for row in rows)
    better = sum(row["short"] < row["scratch"] for row in rows)
    lines.append(f"  the short training takes {share:.0%} of the time; it ends below training from scratch {better} of "
                 f"{len(rows)} times")
    return lines


def ablate(setup, candidates: list, options: argparse.Namespace, step_tokens: int) -> list[dict]:  # type: ignore[no-untyped-def]
    """Every variant over the same candidates: loss right after pruning (all of them) and after a short training (some)."""
    from stages.importance import LAYER_SCORES, VARIANTS

    few, backbone = candidates[: options.ablated], setup.recipe.model
    wide = [replace(candidate, num_layers=backbone.num_layers, attention=()) for candidate in few]
    deep = [replace(backbone, num_layers=layers) for layers in (4, 3, 2)]
    shared = [replace(backbone, num_layers=layers, block_repeat=2) for layers in (2, 1)]
    plans: list[tuple[str, str, list]] = [
        *(("variant", variant, wide) for variant in VARIANTS), *(("layers", score, deep) for score in LAYER_SCORES),
        *(("share", share, shared) for share in ("first", "best", "mean")),
    ]  # fmt: skip
    found = []
    for field, value, models in plans:
        training: Callable = setup.pruned(**{field: value})
        scores = [training(model, options.short_steps * step_tokens, options.seed) for model in models]
        found.append({"choice": field, "value": value, "candidates": len(models),
                      "pruned": statistics.mean(score.start_loss for score in scores),
                      "short": statistics.mean(score.loss for score in scores)})  # fmt: skip
        train_step.note(f"{field} {value}: {found[-1]['pruned']:.3f}, then {found[-1]['short']:.3f}")
    return found


def ablation_lines(rows: list[dict]) -> list[str]:
    titles = {"variant": "widths pruned, all blocks kept", "layers": "4, 3, 2 of 5 blocks kept",
              "share": "2 blocks and 1, each run twice"}
    lines, last = [], None
    for row in rows:
        if row["choice"] != last:
            last = row["choice"]
            lines += ["", f"{titles[last]}, mean of {row['candidates']}: held-out loss after pruning, after short training"]
        lines.append(f"  {row['value']:<12}{row['pruned']:>8.3f}{row['short']:>8.3f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
