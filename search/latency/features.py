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
from search.latency import mixture
from search.latency.mixture import BYTES_A_WEIGHT

Metric = Literal["ttft", "prefill", "decode", "peak_memory"]
"""ttft, prefill: ms of the whole prompt (first token included or not); decode: ms a token; peak_memory: MiB."""
METRICS: tuple[str, ...] = get_args(Metric)
UNITS = {"ttft": "ms", "prefill": "ms", "decode": "ms", "peak_memory": "MiB"}
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
NAMES = {"ttft": (*TIMES, *mixture.TIMES), "prefill": (*TIMES, *mixture.TIMES),
         "decode": (*TIMES, *(f"beyond_{size}_mb" for size in CACHES_MB), *mixture.TIMES),
         "peak_memory": ("weight_mb", "embedding_mb", "kv_mb", "activation_mb", "one", *mixture.MEMORY)}  # fmt: skip
"""What only mixtures of experts have stands last."""


def feature_table(
    configs: Sequence[ModelConfig], metric: Metric, context: int, threads: int = 1, *, mixtures: bool = True
) -> NDArray[np.float64]:
    """[configs, NAMES[metric]], all >= 0. Raises ValueError for an unknown metric or a context below 1.

    mixtures: with the columns that only they have; where none was read these say nothing, and a fit without them is to the
    last bit what it was before they came.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; expected one of {', '.join(METRICS)}")
    if context < 1 or threads < 1:
        raise ValueError(f"context={context} and threads={threads} must be at least 1")
    rows = [features(config, metric, context, threads) for config in configs]
    names = [name for name in NAMES[metric] if mixtures or name not in (*mixture.TIMES, *mixture.MEMORY)]
    return np.array([[row[name] for name in names] for row in rows], dtype=np.float64).reshape(len(rows), -1)


def features(config: ModelConfig, metric: Metric, context: int, threads: int = 1) -> dict[str, float]:
    """By name. A prompt of `context` tokens, or for `decode` one token after so many.

    Of a mixture of experts work counts the experts that a token uses; weights count once if any of the tokens uses them,
    but for memory, where the whole file lies.
    """
    tokens = 1 if metric == "decode" else context
    hidden, query, cache = config.hidden_size, config.query_size, config.kv_size
    groups = mixture.ffn_groups(config)
    kinds = config.attention_kinds * config.block_repeat
    layers, full, window = len(kinds), kinds.count("full"), kinds.count("window")
    attended = full + window
    full_pairs = full * _tokens_seen(tokens, context, context)
    window_pairs = window * _tokens_seen(tokens, context, config.window)
    rows = [row for ffn, times in groups for row in ((2 * ffn, hidden, times), (hidden, ffn, times))]
    rows += [(query + 2 * cache, hidden, attended), (hidden, query, attended)]
    head = config.head_size * hidden
    embeddings = head if config.tie_embeddings else head + config.vocab_size * hidden
    idle = 0.0 if metric == "peak_memory" else mixture.idle_weights(config, tokens)
    weight_mb = 1e-6 * BYTES_A_WEIGHT * (config.num_params() - embeddings - idle)
    rest_mb = 1e-6 * (BYTES_A_WEIGHT * head + config.kv_bytes(context, KV_BITS))
    return {
        "ffn_gflop": sum(2e-9 * tokens * 3 * hidden * ffn * times for ffn, times in groups),
        "projection_gflop": 2e-9 * tokens * 2 * hidden * (query + cache) * attended,
        "full_scores_gflop": 4e-9 * query * full_pairs,
        "window_scores_gflop": 4e-9 * query * window_pairs,
        "softmax_m": 1e-6 * config.num_heads * (full_pairs + window_pairs),
        "head_gflop": 2e-9 * head,
        "hidden_m": 1e-6 * tokens * hidden * (layers + attended),
        "ffn_m": sum(1e-6 * tokens * ffn * times for ffn, times in groups),
        "query_m": 1e-6 * tokens * query * attended,
        "cache_m": 1e-6 * tokens * cache * attended,
        "uneven_threads_gflop": 2e-9 * tokens * sum((-r % (PANEL * threads)) * k * times for r, k, times in rows),
        # A block that is repeated comes from memory once; what its work costs each time is counted above.
        "weight_mb": weight_mb,
        "embedding_mb": 1e-6 * BYTES_A_WEIGHT * embeddings,
        "kv_mb": 1e-6 * config.kv_bytes(context, KV_BITS),
        "activation_mb": 4e-6 * min(tokens, 512) * (3 * hidden + 3 * mixture.widest_row(config) + 2 * query),
        "layers": float(layers),
        "attention_layers": float(attended),
        "one": 1.0,
        **{f"beyond_{size}_mb": _beyond(weight_mb + rest_mb, 1e-6 * BYTES_A_WEIGHT * idle, size) for size in CACHES_MB},
        **mixture.features(config, tokens),
    }


def _beyond(read: float, idle: float, cache: float) -> float:
    """MB of what a token reads that do not lie in a cache of so many MB. What this token does not read another did: the
    cache holds a share of all of it."""
    return max(0.0, read - cache * (read / (read + idle) if idle else 1.0))


def proxies(config: ModelConfig, metric: Metric, context: int) -> dict[str, float]:
    """The counts that are often taken for a latency: shown beside the model to say how well they rank. FLOPs of a mixture
    are those of the experts in use."""
    tokens = 1 if metric == "decode" else context
    return {"parameters": float(config.num_params()), "flops": float(config.flops_per_token(context) * tokens)}


def _tokens_seen(tokens: int, context: int, window: int) -> float:
    """Sum over `tokens` positions that end at `context` (all of it, or its last) of the positions each attends to."""
    if tokens == 1:
        return float(min(context, window))
    short = min(tokens, window)
    return short * (short + 1) / 2 + (tokens - short) * window
