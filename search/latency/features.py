"""What a model's time and memory are made of, from its shape alone: work by kind, bytes moved, counts, tile waste.

The times of a device are close to a weighted sum of these (a roofline has one more kink), the weights being the device's:
that is why few readings suffice. Units are GFLOP, MB and millions, so that the columns are of similar size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from modeling.config import ModelConfig

Metric = Literal["ttft", "prefill", "decode", "peak_memory"]
"""ttft, prefill: ms of the whole prompt (first token included or not); decode: ms a token; peak_memory: MiB."""
METRICS: tuple[str, ...] = get_args(Metric)
UNITS = {"ttft": "ms", "prefill": "ms", "decode": "ms", "peak_memory": "MiB"}
TILE = 64
"""Rows that kernels work on together, at most; what is no multiple of it leaves lanes idle."""

WORK = ("ffn_gflop", "projection_gflop", "full_scores_gflop", "window_scores_gflop", "head_gflop", "elementwise_m",
        "tile_waste_gflop", "uneven_threads_gflop")  # fmt: skip
BYTES = ("weight_mb", "embedding_mb", "kv_mb", "activation_mb")
COUNTS = ("layers", "attention_layers", "one")
NAMES = {"ttft": WORK + BYTES + COUNTS, "prefill": WORK + BYTES + COUNTS, "decode": WORK + BYTES + COUNTS,
         "peak_memory": (*BYTES, "one")}  # fmt: skip


def feature_table(configs: Sequence[ModelConfig], metric: Metric, context: int, threads: int = 1) -> NDArray[np.float64]:
    """[configs, NAMES[metric]], all >= 0. Raises ValueError for an unknown metric or a context below 1."""
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; expected one of {', '.join(METRICS)}")
    if context < 1 or threads < 1:
        raise ValueError(f"context={context} and threads={threads} must be at least 1")
    rows = [features(config, metric, context, threads) for config in configs]
    return np.array([[row[name] for name in NAMES[metric]] for row in rows], dtype=np.float64).reshape(len(rows), -1)


def features(config: ModelConfig, metric: Metric, context: int, threads: int = 1) -> dict[str, float]:
    """By name. A prompt of `context` tokens, or for `decode` one token after so many."""
    tokens = 1 if metric == "decode" else context
    kinds = config.attention_kinds * config.block_repeat
    full, window = kinds.count("full"), kinds.count("window")
    attended = full + window
    ffn = 3 * config.hidden_size * config.ffn_size * len(kinds)
    projection = 2 * config.hidden_size * (config.query_size + config.kv_size) * attended
    seen = _tokens_seen(tokens, context, context)
    seen_window = _tokens_seen(tokens, context, config.window)
    elementwise = 4 * config.hidden_size + 3 * config.ffn_size
    matrices = config.num_params() - config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    rows = ((2 * config.ffn_size, config.hidden_size, len(kinds)), (config.hidden_size, config.ffn_size, len(kinds)),
            (config.query_size + 2 * config.kv_size, config.hidden_size, attended),
            (config.hidden_size, config.query_size, attended))  # fmt: skip
    return {
        "ffn_gflop": 2e-9 * ffn * tokens,
        "projection_gflop": 2e-9 * projection * tokens,
        "full_scores_gflop": 4e-9 * config.query_size * seen * full,
        "window_scores_gflop": 4e-9 * config.query_size * seen_window * window,
        "head_gflop": 2e-9 * config.vocab_size * config.hidden_size,
        "elementwise_m": 1e-6 * tokens * (elementwise * len(kinds) + 2 * (config.query_size + config.kv_size) * attended),
        "tile_waste_gflop": 2e-9 * tokens * sum(_padding(r, TILE) * k * times for r, k, times in rows),
        "uneven_threads_gflop": 2e-9 * tokens * sum(_padding(r, 8 * threads) * k * times for r, k, times in rows),
        "weight_mb": 1e-6 * 0.5625 * matrices * config.block_repeat if metric != "peak_memory" else 1e-6 * 0.5625 * matrices,
        "embedding_mb": 1e-6 * 0.5625 * config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2),
        "kv_mb": 1e-6 * config.kv_bytes(context, 16),
        "activation_mb": 4e-6 * min(tokens, 512) * (3 * config.hidden_size + 3 * config.ffn_size + 2 * config.query_size),
        "layers": float(len(kinds)),
        "attention_layers": float(attended),
        "one": 1.0,
    }  # fmt: skip


def proxies(config: ModelConfig, metric: Metric, context: int) -> dict[str, float]:
    """The counts that are often taken for a latency: shown beside the model to say how well they rank."""
    tokens = 1 if metric == "decode" else context
    return {"parameters": float(config.num_params()), "flops": float(config.flops_per_token(context) * tokens)}


def _tokens_seen(tokens: int, context: int, window: int) -> float:
    """Sum over `tokens` positions that end at `context` (all of it, or its last) of the positions each attends to."""
    if tokens == 1:
        return float(min(context, window))
    short = min(tokens, window)
    return short * (short + 1) / 2 + (tokens - short) * window


def _padding(rows: int, tile: int) -> int:
    return -rows % tile
