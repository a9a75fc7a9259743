"""What a model's time and memory are made of, from its shape alone: work by kind, bytes moved, counts.

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
BYTES_A_WEIGHT = 0.5625
"""Four bits, and a half-precision scale for every 32."""
KV_BITS = 8
PANEL = 16
"""Rows of a matrix that lie together in a packed file: the least that a thread takes."""

WORK = ("ffn_gflop", "projection_gflop", "full_scores_gflop", "window_scores_gflop", "softmax_m", "head_gflop", "hidden_m",
        "ffn_m", "query_m", "cache_m", "uneven_threads_gflop")  # fmt: skip
"""Products by kind; exponentials of scores; elements of what is normed, quantized, added, rotated, gated, stored."""
COUNTS = ("layers", "attention_layers", "one")
CACHES_MB = (4, 8, 16)
"""A token reads all weights once: what is beyond the processor's cache, whose share of it nobody knows, comes from memory."""
TIMES = (*WORK, "weight_mb", "kv_mb", *COUNTS)
NAMES = {"ttft": TIMES, "prefill": TIMES, "decode": (*TIMES, *(f"beyond_{size}_mb" for size in CACHES_MB)),
         "peak_memory": ("weight_mb", "embedding_mb", "kv_mb", "activation_mb", "one")}  # fmt: skip


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
    hidden, ffn, query, cache = config.hidden_size, config.ffn_size, config.query_size, config.kv_size
    kinds = config.attention_kinds * config.block_repeat
    layers, full, window = len(kinds), kinds.count("full"), kinds.count("window")
    attended = full + window
    full_pairs = full * _tokens_seen(tokens, context, context)
    window_pairs = window * _tokens_seen(tokens, context, config.window)
    rows = ((2 * ffn, hidden, layers), (hidden, ffn, layers), (query + 2 * cache, hidden, attended), (hidden, query, attended))
    head = config.head_size * hidden
    embeddings = head if config.tie_embeddings else head + config.vocab_size * hidden
    weight_mb = 1e-6 * BYTES_A_WEIGHT * (config.num_params() - embeddings)
    read_mb = weight_mb + 1e-6 * (BYTES_A_WEIGHT * head + config.kv_bytes(context, KV_BITS))
    return {
        "ffn_gflop": 2e-9 * tokens * 3 * hidden * ffn * layers,
        "projection_gflop": 2e-9 * tokens * 2 * hidden * (query + cache) * attended,
        "full_scores_gflop": 4e-9 * query * full_pairs,
        "window_scores_gflop": 4e-9 * query * window_pairs,
        "softmax_m": 1e-6 * config.num_heads * (full_pairs + window_pairs),
        "head_gflop": 2e-9 * head,
        "hidden_m": 1e-6 * tokens * hidden * (layers + attended),
        "ffn_m": 1e-6 * tokens * ffn * layers,
        "query_m": 1e-6 * tokens * query * attended,
        "cache_m": 1e-6 * tokens * cache * attended,
        "uneven_threads_gflop": 2e-9 * tokens * sum((-r % (PANEL * threads)) * k * times for r, k, times in rows),
        # A block that is repeated comes from memory once; what its work costs each time is counted above.
        "weight_mb": weight_mb,
        "embedding_mb": 1e-6 * BYTES_A_WEIGHT * embeddings,
        "kv_mb": 1e-6 * config.kv_bytes(context, KV_BITS),
        "activation_mb": 4e-6 * min(tokens, 512) * (3 * hidden + 3 * ffn + 2 * query),
        "layers": float(layers),
        "attention_layers": float(attended),
        "one": 1.0,
        **{f"beyond_{size}_mb": max(0.0, read_mb - size) for size in CACHES_MB},
    }


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
