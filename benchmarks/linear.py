"""One INT4 matrix, INT8 activations, one thread: ours against ONNX Runtime's MatMulNBits and ExecuTorch's XNNPACK.

    python benchmarks/linear.py                                       # after `make interop`; about five minutes
    python benchmarks/linear.py --executorch-python ENV/bin/python    # a peer that lives in an environment of its own

All get the same codes, scales (groups of 32) and activations, and what each computes is held against the product
without rounding of activations before its time counts. Rounds alternate; a figure is the median of a round's calls, a ratio the
median of the rounds' ratios. Rounding the activations and laying them out is part of it everywhere. Calls from Python
are not: a call that computes (next to) nothing is timed as well, printed beside, and taken off both sides of a ratio.
Refuses to print while the kernels' tests are red.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

SHAPES = ((8192, 2048), (3072, 576), (2048, 8192))
COUNTS = (1, 8, 128)
PEERS = {
    "MatMulNBits": ("_onnx_linear.py", ("onnxruntime", "onnx")),
    "XNNPACK": ("_executorch_linear.py", ("executorch", "torchao")),
}
MOST_DISTANT = 0.02
"""Relative L2 distance to the exact product; INT8 rounding of normal activations makes about 0.01."""
QUIET_LOAD = 1.7
"""One thread of the contender before is in the load of the last minute; more is somebody else."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON", help="has onnxruntime and onnx")
    parser.add_argument("--executorch-python", metavar="PYTHON", help="has executorch (default: as --peer-python)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: expected at least 1")
    pythons = {"MatMulNBits": options.peer_python, "XNNPACK": options.executorch_python or options.peer_python}
    lacking = {}
    for name, python in pythons.items():
        try:
            if not has(python, PEERS[name][1]):
                lacking[name] = f"{name}: not run, {python} has no {' and '.join(PEERS[name][1])}"
        except OSError as error:
            parser.error(f"{python} does not start: {error.strerror}")
    train_step.TESTS = ("tests/kernels/test_check.py", "tests/kernels/test_packed_layout.py")  # type: ignore[misc]
    train_step.require_green()
    contenders = {"ours": "", **{name: python for name, python in pythons.items() if name not in lacking}}
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines.append(f"one thread, {options.rounds} rounds; us of a call, ratios of theirs to ours, calls taken off both")
    loads = [os.getloadavg()[0]]
    for n, k in SHAPES:
        with tempfile.TemporaryDirectory(prefix="linear_") as folder:
            write_matrix(Path(folder), n, k)
            for count in COUNTS:
                rounds = [measure(contenders, Path(folder), count, number) for number in range(options.rounds)]
                loads.append(os.getloadavg()[0])
                lines += report(f"{n} x {k}, {count}", rounds)
                train_step.note("\n".join(lines[-len(contenders) :]))
    lines.append(f"load before: {loads[0]:.1f}, highest while measuring: {max(loads):.1f}")
    if max(loads) > QUIET_LOAD:
        lines.append("THE MACHINE WAS NOT QUIET: do not quote these figures")
    sys.stdout.write("\n".join([*lines, *lacking.values()]) + "\n")
    return 0


def has(python: str, packages: tuple[str, ...]) -> bool:
    return subprocess.run([python, "-c", f"import {', '.join(packages)}"], capture_output=True).returncode == 0


def write_matrix(folder: Path, n: int, k: int) -> None:
    """matrix.npz, and x_COUNT.npy with exact_COUNT.npy for each count."""
    draw = np.random.default_rng(0)
    codes = draw.integers(-8, 8, (n, k), dtype=np.int8)
    scales = draw.uniform(0.01, 0.03, (n, k // 32)).astype(np.float16)
    np.savez(folder / "matrix.npz", codes=codes, scales=scales)
    weights = codes * scales.astype(np.float32).repeat(32, axis=1)
    for count in COUNTS:
        x = draw.standard_normal((count, k)).astype(np.float32)
        np.save(folder / f"x_{count}.npy", x)
        np.save(folder / f"exact_{count}.npy", x @ weights.T)


def measure(contenders: dict[str, str], folder: Path, count: int, number: int) -> dict[str, Any]:
    """Of one round, contender -> {"seconds", "call", "distance"}. Exits where one's numbers are wrong."""
    exact, done = np.load(folder / f"exact_{count}.npy"), {}
    for name in contenders if number % 2 == 0 else reversed(contenders):
        done[name] = ours(folder, count) if name == "ours" else peer(name, contenders[name], folder, count)
        distance = float(np.linalg.norm(done[name].pop("y") - exact) / np.linalg.norm(exact))
        if not distance < MOST_DISTANT:
            sys.exit(f"no figures: {name} is {distance:.3g} from the exact product, expected below {MOST_DISTANT}")
        done[name]["distance"] = distance
    return done


def ours(folder: Path, count: int) -> dict[str, Any]:
    import torch

    from kernels.ops import linear_int4
    from kernels.packed_layout import pack_int4

    matrix = np.load(folder / "matrix.npz")
    panels = torch.from_numpy(pack_int4(matrix["codes"], matrix["scales"]))
    x, n = torch.from_numpy(np.load(folder / f"x_{count}.npy")), len(matrix["codes"])
    few = x[0, :32].contiguous()
    tiny = torch.from_numpy(pack_int4(matrix["codes"][:32, :32].copy(), matrix["scales"][:32, :1].copy()))
    return {"seconds": timed(lambda: linear_int4(x, panels, n), repeats(count)),
            "call": timed(lambda: linear_int4(few, tiny, 32), repeats(count)),
            "y": linear_int4(x, panels, n).numpy()}  # fmt: skip


def timed(call: Callable[[], object], repeats: int) -> float:
    """Median seconds after five calls to warm up."""
    seconds = []
    for repeat in range(repeats + 5):
        start = time.perf_counter()
        call()
        if repeat >= 5:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peer(name: str, python: str, folder: Path, count: int) -> dict[str, Any]:
    """Its script writes y_COUNT.npy and prints every call's seconds, of the product and of nothing."""
    command = [python, str(ROOT / "benchmarks" / PEERS[name][0]), str(folder), str(count), str(repeats(count))]
    done = subprocess.run(command, capture_output=True, text=True, env=train_step.environment())
    if done.returncode:
        sys.exit(f"{done.stderr[-1500:]}\nno figures: {name} ended with {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    y: NDArray[np.float32] = np.load(folder / f"y_{count}.npy")
    (folder / f"y_{count}.npy").unlink()
    return {"seconds": statistics.median(found["seconds"]), "call": statistics.median(found["call"]), "y": y}


def repeats(count: int) -> int:
    return 30 if count > 8 else 200


def report(label: str, rounds: list[dict[str, Any]]) -> list[str]:
    """A line for ours, one for each peer."""

    def middle(name: str, key: str) -> float:
        return statistics.median(done[name][key] for done in rounds)

    lines = []
    for name in ("ours", *(name for name in rounds[0] if name != "ours")):
        ratios = [(done[name]["seconds"] - done[name]["call"]) / (done["ours"]["seconds"] - done["ours"]["call"])
                  for done in rounds]  # fmt: skip
        ratio = f"{statistics.median(ratios):>8.2f}{f'{min(ratios):.2f}..{max(ratios):.2f}':>14}"
        lines.append(f"{label if name == 'ours' else '':<20}{name:<14}{1e6 * middle(name, 'seconds'):>8.0f} us"
                     f" (call {1e6 * middle(name, 'call'):>2.0f}){'' if name == 'ours' else ratio:<22}"
                     f"  {middle(name, 'distance'):.4f} from exact")  # fmt: skip
    return lines


if __name__ == "__main__":
    sys.exit(main())
