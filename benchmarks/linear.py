"""One quantized matrix: ours against ONNX Runtime's MatMulNBits, one thread, activations rounded to INT8 on both sides.

    python benchmarks/linear.py --peer-python ENV/bin/python      # ENV has onnxruntime and onnx

Rounds alternate; a figure is the median of a round's calls, a ratio the median of the rounds' ratios. Ours includes rounding
the activations and laying them out. Refuses to print while the kernels' tests are red.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import train_step  # noqa: E402

SHAPES = ((8192, 2048), (3072, 576), (2048, 8192))
COUNTS = (1, 8, 128)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, metavar="PYTHON")
    options = parser.parse_args()
    train_step.TESTS = ("tests/kernels/test_check.py", "tests/kernels/test_packed_layout.py")  # type: ignore[misc]
    train_step.require_green()
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines.append(f"{'N x K, tokens':<22}{'ours us':>10}{'MatMulNBits us':>16}{'ratio':>8}{'rounds':>16}")
    for n, k in SHAPES:
        for count in COUNTS:
            rounds = []
            for number in range(options.rounds):
                pair = {}
                for name in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                    pair[name] = ours(n, k, count) if name == "ours" else peer(options.peer_python, n, k, count)
                rounds.append((pair["ours"], pair["peer"]))
            ratios = [theirs / mine for mine, theirs in rounds]
            mine, theirs = (statistics.median(column) for column in zip(*rounds, strict=True))
            lines.append(f"{f'{n} x {k}, {count}':<22}{1e6 * mine:>10.0f}{1e6 * theirs:>16.0f}{statistics.median(ratios):>8.2f}"
                         f"{f'{min(ratios):.2f}..{max(ratios):.2f}':>16}")  # fmt: skip
            train_step.note(lines[-1])
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def ours(n: int, k: int, count: int) -> float:
    """Median seconds of a call."""
    import numpy as np
    import torch

    from kernels.ops import linear_int4
    from kernels.packed_layout import pack_int4

    draw = np.random.default_rng(0)
    codes = draw.integers(-8, 8, (n, k), dtype=np.int8)
    panels = torch.from_numpy(pack_int4(codes, np.full((n, k // 32), 0.02, np.float16)))
    x = torch.randn(count, k)
    seconds = []
    for repeat in range(_repeats(count) + 5):
        start = time.perf_counter()
        linear_int4(x, panels, n)
        if repeat >= 5:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peer(python: str, n: int, k: int, count: int) -> float:
    command = [python, str(ROOT / "benchmarks" / "_onnx_linear.py"), str(n), str(k), str(count), str(_repeats(count))]
    done = subprocess.run(command, capture_output=True, text=True, env=train_step.environment())
    if done.returncode:
        sys.exit(f"{done.stderr[-1500:]}\nno figures: the peer ended with {done.returncode}")
    return statistics.median(json.loads(done.stdout)["seconds"])


def _repeats(count: int) -> int:
    return 30 if count > 8 else 200


if __name__ == "__main__":
    sys.exit(main())
