"""Tokens per second of our training loop against its peers, and of two workers against one.

    python benchmarks/train_step.py                  # about seven minutes on two cores
    python benchmarks/train_step.py --contenders ours,bare --rounds 3

Contenders (`_contenders.py`), all in fp32 with fused AdamW, clipping and a cosine schedule on the same rows:
    ours                  stages.run.run_stages: loader thread, metrics, W&B offline
    ours_2_workers        the same global batch on two processes over gloo (FSDP), one thread each
    bare                  a bare PyTorch loop over the same Decoder, F.cross_entropy on whole logits
    bare_same_loss        that loop with our loss function, so that only the framework differs
    two_alone             two such bare loops at once on half the rows each, which never speak: the machine's limit
    transformers_trainer  transformers.Trainer, LlamaForCausalLM of the same shape
    torchtitan_trainer    torchtitan 0.2.2's trainer and Llama, where it is installed

Every contender runs alone, in a fresh process with one thread; rounds go through them in alternating order. A step is
the time between two optimizer steps; a process counts by its median step, a contender by the median of its rounds, and
a ratio by the median of the rounds' ratios. Before anything is timed, the tests that hold the loop to its references
must pass. Prints a table; `--output F.json` also saves every step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _shape as shape  # noqa: E402

# name -> (entry of _contenders.py, processes)
CONTENDERS = {
    "ours": ("ours", 1),
    "bare": ("bare", 1),
    "bare_same_loss": ("bare_same_loss", 1),
    "transformers_trainer": ("transformers_trainer", 1),
    "torchtitan_trainer": ("torchtitan_trainer", 1),
    "ours_2_workers": ("ours", 2),
    "two_alone": ("two_alone", 2),
}
# (numerator, denominator, aim; None says how much two processes could gain on this machine)
RATIOS: tuple[tuple[str, str, float | None], ...] = (
    ("ours", "bare", 0.97),
    ("ours", "bare_same_loss", 0.97),
    ("ours", "transformers_trainer", 1.2),
    ("ours", "torchtitan_trainer", 1.0),
    ("ours_2_workers", "ours", 1.7),
    ("two_alone", "bare_same_loss", None),
)
DATA_WAIT_AIM = 0.01
TESTS = ("tests/modeling", "tests/stages/test_objectives.py", "tests/stages/test_trainer.py",
         "tests/distributed/test_equal_workers.py")  # fmt: skip
QUIET_LOAD = 2.5
"""Two workers of the contender before may still be in the load of the last minute; more is somebody else."""
SAME_WORK = ("ours", "bare", "bare_same_loss", "ours_2_workers")
"""Contenders with the same weights and rows: their first losses must agree."""
WARM_UP = 1
"""Intervals left out at the start of every process."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="comma-separated (default: all)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a process (default: 8)")
    parser.add_argument("--output", type=Path, help="also write every measured step to this JSON file")
    options = parser.parse_args()
    names = options.contenders.split(",")
    if unknown := set(names) - set(CONTENDERS):
        parser.error(f"unknown contender {min(unknown)!r}; known are {', '.join(CONTENDERS)}")
    if options.rounds < 1 or options.steps < WARM_UP + 3:
        parser.error(f"--rounds {options.rounds} --steps {options.steps}: expected at least 1 and {WARM_UP + 3}")
    names, left_out = installed(names)
    require_green()
    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        rounds = measure(names, Path(folder), options.rounds, options.steps)
    text = table(rounds, left_out, options.steps)
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(json.dumps({"conditions": conditions(), "rounds": rounds}, indent=1))
    return 0


def installed(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The contenders that can run here, and a sentence for each that cannot."""
    needs = {"transformers_trainer": ("transformers", "accelerate"), "torchtitan_trainer": ("torchtitan", "triton")}
    left_out = []
    for name in names:
        if lacking := [package for package in needs.get(name, ()) if importlib.util.find_spec(package) is None]:
            left_out.append(f"{name}: not run, {' and '.join(lacking)} not installed (see benchmarks/README.md)")
    gone = {line.split(":")[0] for line in left_out}
    return [name for name in names if name not in gone], left_out


def require_green() -> None:
    """A speed counts only while the results are right. Exits with 1 where a test of the loop fails."""
    present = [test for test in TESTS if (ROOT / test).exists()]
    if len(present) < len(TESTS):
        sys.exit(f"no figures: {', '.join(sorted(set(TESTS) - set(present)))} missing; the loop cannot be held to it")
    command = [sys.executable, "-m", "pytest", "-x", "--disable-warnings", *present]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    if result.returncode:
        sys.exit(f"{result.stdout[-2000:]}\nno figures: these tests are red; make them pass first")
    note(f"tests: {result.stdout.strip().splitlines()[-1]}")


def measure(names: Sequence[str], folder: Path, rounds: int, steps: int) -> list[dict[str, Any]]:
    """One dictionary a round: contender -> {"durations": [...], "load": ..., ...}."""
    note("preparing the rows")
    start("prepare", folder, steps, world=1, round_number=0)
    results = []
    for number in range(rounds):
        done = {}
        for name in names if number % 2 == 0 else reversed(names):
            entry, world = CONTENDERS[name]
            load = os.getloadavg()[0]
            start(entry, folder, steps, world=world, round_number=number)
            done[name] = json.loads((folder / f"{name}.json").read_text()) | {"load_before": load}
            note(f"round {number + 1}/{rounds} {name}: {rate(done[name]):.0f} tokens/s")
        require_same_work(done)
        results.append(done)
    return results


def require_same_work(done: Mapping[str, Any]) -> None:
    """Exits where contenders that start from the same weights and rows do not have the same first loss."""
    losses = {name: done[name]["first_loss"] for name in SAME_WORK if name in done}
    if losses and max(losses.values()) - min(losses.values()) > 1e-5 * max(losses.values()):
        sys.exit(f"no figures: the contenders did not do the same work, their first losses are {losses}")


def start(entry: str, folder: Path, steps: int, *, world: int, round_number: int) -> None:
    """Run one contender to its end. Exits with what it wrote where it fails."""
    command = [sys.executable, str(ROOT / "benchmarks" / "_contenders.py"), entry, str(folder), str(steps)]
    port = str(free_port())
    processes = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port} if world > 1 else {}  # fmt: skip
        log = (folder / f"{entry}-{world}-{round_number}-{rank}.log").open("w+")
        extra = ranks | {"POCKETFORGE_BENCH_ROUND": str(round_number)}
        processes.append((subprocess.Popen(command, stdout=log, stderr=log, env=environment(extra)), log))
    failed = ""
    for process, log in processes:
        code = process.wait()
        log.seek(0)
        if code and not failed:
            failed = f"{log.read()[-3000:]}\n{entry} exited with {code}; no figures"
        log.close()
    if failed:
        sys.exit(failed)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """One thread a process, no network, the repository on the path."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return clean | threads | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                              **(extra or {})}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rate(result: Mapping[str, Any]) -> float:
    """Tokens per second at the median step."""
    return shape.TOKENS_PER_STEP / statistics.median(result["durations"][WARM_UP:])


def table(rounds: Sequence[Mapping[str, Any]], left_out: Sequence[str], steps: int) -> str:
    model = shape.MODEL
    lines = [f"{key}: {value}" for key, value in conditions().items()]
    lines += [
        f"shape: {model.num_layers} layers, width {model.hidden_size}, {model.num_heads} heads ({model.num_kv_heads} "
        f"key/value), feed-forward {model.ffn_size}, vocabulary {model.vocab_size}, {model.num_params():,} parameters; "
        f"{shape.ROWS} rows x {shape.SEQ_LEN} tokens a step, fp32, one thread a process",
        f"rounds: {len(rounds)} of {steps} steps, the first {WARM_UP + 1} steps of each process left out",
        "",
        f"{'contender':<22}{'tokens/s':>10}{'slowest..fastest round':>26}{'CPU s a step':>14}{'load before':>13}",
    ]
    for name in CONTENDERS:
        if name in rounds[0]:
            rates = [rate(done[name]) for done in rounds]
            load = max(done[name]["load_before"] for done in rounds)
            spread = f"{min(rates):.0f}..{max(rates):.0f}"
            cpu = statistics.median(statistics.median(done[name]["cpu_durations"][WARM_UP:]) for done in rounds)
            lines.append(f"{name:<22}{statistics.median(rates):>10.0f}{spread:>26}{cpu:>14.2f}{load:>13.1f}")
    lines += ["", f"{'ratio':<40}{'median':>8}{'rounds':>18}{'aim':>10}"]
    for over, under, aim in RATIOS:
        if over in rounds[0] and under in rounds[0]:
            ratios = [rate(done[over]) / rate(done[under]) for done in rounds]
            middle = statistics.median(ratios)
            spread = f"{min(ratios):.3f}..{max(ratios):.3f}"
            aimed = "" if aim is None else f"{f'>= {aim}':>10}  {'reached' if middle >= aim else 'missed'}"
            lines.append(f"{over + ' / ' + under:<40}{middle:>8.3f}{spread:>18}{aimed}")
    for name in ("ours", "ours_2_workers"):
        if name in rounds[0]:
            wait = max(done[name]["data_wait"] for done in rounds)
            verdict = "reached" if wait < DATA_WAIT_AIM else "missed"
            label = f"data wait, {name}, worst"
            lines.append(f"{label:<40}{100 * wait:>6.2f} %{'':>18}{f'< {DATA_WAIT_AIM:.0%}':>10}  {verdict}")
    if (load := max(result["load_before"] for done in rounds for result in done.values())) > QUIET_LOAD:
        lines.append(f"THE MACHINE WAS NOT QUIET (load {load:.1f} before a contender): do not quote these figures")
    return "\n".join([*lines, *left_out]) + "\n"


def conditions() -> dict[str, str]:
    import torch

    revision = ""
    if git := shutil.which("git"):
        command = [git, "describe", "--always", "--dirty", "--abbrev=12"]
        revision = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}",
        "revision": revision or "unknown",
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def note(text: str) -> None:
    """Progress, for the person who waits."""
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
