"""Tokens per second of tokenising, packing and loading, against the machine's own copy of the same bytes.

    python benchmarks/loader.py --seq-len 256

Refuses to print while the data pipeline's tests are red.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.loader import BatchLoader
from data_pipeline.prepare import ensure_tokenizer, prepare_stage

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64, help="rows a step")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/data_pipeline"], cwd=ROOT).returncode != 0:
        sys.exit("the data pipeline's tests are red; no figures")
    source = SourceConfig(name="library", format="python_docs", max_bytes=8_000_000)
    data = DataConfig(sources=(source,))
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = ensure_tokenizer(TokenizerConfig(vocab_size=4096), data, cache, 0)
        started = time.perf_counter()
        stage = prepare_stage(data, tokenizer, options.seq_len, cache, 0)
        prepared = time.perf_counter() - started
        loads, copies = [], []
        for _ in range(options.rounds):
            loads.append(time_loader(stage, options.rows, options.steps))
            copies.append(time_copy(options.rows, options.seq_len, options.steps))
    tokens = options.rows * options.seq_len * options.steps
    load, copy = statistics.median(loads), statistics.median(copies)
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{options.rows} x {options.seq_len} tokens a step\n"
        f"prepare    8.0 MB of text in {prepared:.2f} s ({8.0 / prepared:.1f} MB/s)\n"
        f"loader     {tokens / load / 1e6:.1f} M tokens/s\n"
        f"of memory  {copy / load:.2f} of the speed of copying the same tensors\n"
    )


def time_loader(stage, rows: int, steps: int) -> float:  # type: ignore[no-untyped-def]
    with BatchLoader(stage, seed=0, global_batch=rows, rank=0, world=1) as loader:
        loader.next_step()
        started = time.perf_counter()
        for _ in range(steps):
            loader.next_step()
        return time.perf_counter() - started


def time_copy(rows: int, seq_len: int, steps: int) -> float:
    """What it takes to move as many bytes: three int64 tensors a step."""
    held = torch.zeros(3, rows, seq_len, dtype=torch.int64)
    started = time.perf_counter()
    for _ in range(steps):
        held.clone()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
