"""Does a mixture of experts learn more than a dense model of as many active parameters, from the same tokens?

    python benchmarks/moe_quality.py --folder DIR [--seeds 3] [--steps 420]

Five shapes of the quickstart's width and depth are pre-trained on the same rows of real text (the sets of POCKETFORGE_DATA,
else Python's own text), several seeds each: dense; eight coarse experts of which a token uses one; thirty-two fine ones
(a quarter as wide) of which it uses four, three with a shared one in place of the fourth, or two with two merged into a
shared one (`tiny_moe`). Active feed-forward width is the same in all. Prints held-out bits per byte of each seed, the mean,
its distance to dense in spreads of the seeds, and the evenness of load in the last steps; --plot draws the curves.
Finished runs in DIR are kept. Refuses to print while the tests of the layer are red.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

TESTS = ("tests/kernels/test_grouped.py", "tests/modeling/test_moe.py", "tests/stages/test_balance.py")


def shapes() -> dict[str, Any]:
    """Name -> MoEConfig, or None for dense."""
    from launch.recipes.mobilemoe import tiny_moe

    base = tiny_moe().model
    assert base.moe is not None
    width = base.ffn_size
    fine = replace(base.moe, num_experts=32, top_k=4, expert_size=width // 4, shared_size=0)
    return {
        "dense": None,
        "coarse": replace(fine, num_experts=8, top_k=1, expert_size=width),
        "fine": fine,
        "fine + 1 shared": replace(fine, num_experts=31, top_k=3, shared_size=width // 4),
        "fine + 2 shared": replace(fine, num_experts=30, top_k=2, shared_size=width // 2),
    }


def recipe(name: str, seed: int, steps: int) -> Any:
    from launch.recipes.mobilemoe import tiny_moe

    base, moe = tiny_moe(), shapes()[name]
    assert base.pretrain is not None
    stage = replace(base.pretrain, steps=steps, moe=None if moe is None else base.pretrain.moe,
                    data=replace(base.pretrain.data, held_out_fraction=0.05))  # fmt: skip
    held_out = replace(base.train.held_out[0], max_documents=24, max_document_bytes=24_000)
    return replace(
        base, name="moe_quality", model=replace(base.model, moe=moe), pretrain=stage, midtrain=None, sft=None, qat=None,
        train=replace(base.train, seed=seed, log_every=10, held_out=(held_out,)), launch=replace(base.launch, workers=1),
        tracking=replace(base.tracking, wandb="disabled"),
    )  # fmt: skip


def train(folder: Path, name: str, seed: int, steps: int) -> Path:
    """The run's folder; trained where it is not complete."""
    from launch.config import save_toml

    run = folder / f"{name.replace(' ', '')}-{seed}-{steps}"
    if not _finished(run):
        folder.mkdir(parents=True, exist_ok=True)
        save_toml(recipe(name, seed, steps), file := run.with_suffix(".toml"))
        command = [sys.executable, "launch/pretrain.py", "--recipe", str(file), "--output-dir", str(run), "--resume"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{done.stderr[-1500:]}\nno figures: {run.name} ended with {done.returncode}")
    return run


def _finished(run: Path) -> bool:
    scores = run / "pretrain" / "evaluation.json"
    return scores.is_file() and "after" in json.loads(scores.read_text())


def read(run: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    scores = json.loads((run / "pretrain" / "evaluation.json").read_text())["after"]["pretrain"]
    late = [max(row["moe"]["load_max"]) for row in rows[-5:] if "moe" in row]
    return {"bits": scores["bits_per_byte"], "documents": scores["n"], "steps": [row["step"] for row in rows],
            "loss": [row["loss"] for row in rows], "load": max(late, default=None),
            "dead": any(min(row["moe"]["load_min"]) == 0 for row in rows[-5:] if "moe" in row),
            "seconds": statistics.median(row["step_seconds"] for row in rows)}  # fmt: skip


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    from launch.recipes.mobilemoe import tiny_moe

    heads = f"{'mean':>7}{'to dense':>9}{'spreads':>8}{'load max/mean':>14}"
    lines = [f"{'shape':<18}{'active':>9}{'total':>9}  {'bits per byte':<28}{heads}"]
    dense = [one["bits"] for one in found["dense"]]
    for name, runs in found.items():
        bits, model = [one["bits"] for one in runs], replace(tiny_moe().model, moe=shapes()[name])
        gain = statistics.mean(dense) - statistics.mean(bits)
        spread = max(statistics.stdev(bits), statistics.stdev(dense)) if len(bits) > 1 else float("nan")
        load = "" if runs[0]["load"] is None else f"{max(one['load'] for one in runs):.2f}"
        load += " (dead)" if any(one["dead"] for one in runs) else ""
        sizes = "".join(f"{count / 1e6:>8.2f}M" for count in (model.num_active_params(), model.num_params()))
        each = " ".join(f"{one:.4f}" for one in bits)
        lines.append(f"{name:<18}{sizes}  {each:<28}{statistics.mean(bits):>7.4f}{gain:>9.4f}{gain / spread:>8.1f}{load:>14}")
    return lines


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss, mean over seeds, smoothed over five lines."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, runs in found.items():
        curve = np.mean([run["loss"] for run in runs], axis=0)
        smooth = np.convolve(curve, np.ones(5) / 5, mode="valid")
        bits = statistics.mean(run["bits"] for run in runs)
        axis.plot(runs[0]["steps"][4:], smooth, label=f"{name}: {bits:.3f} bits per byte held out")
    axis.set(xlabel="optimizer steps", ylabel="training loss, nats a token", yscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=420)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in shapes()}
    for seed in range(options.seeds):
        for name in found:
            found[name].append(read(train(options.folder, name, seed, options.steps)))
            train_step.note(f"{name}, seed {seed}: {found[name][-1]['bits']:.4f}")
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines.append(f"{options.steps} steps of 2,048 tokens, held out: {found['dense'][0]['documents']} documents")
    sys.stdout.write("\n".join([*lines, *table(found)]) + "\n")
    if options.plot:
        plot(found, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
