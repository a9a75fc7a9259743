"""Which architectures to measure next: where the model is unsure and a front may pass.

The value of a reading is the predictive deviation of the log latency times the chance that the candidate is on the front of
latency and quality. Quality is what the caller knows of it before anything was trained: a prediction, or the number of
parameters as a stand-in; its uncertainty says how much that may be believed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modeling.config import ModelConfig
from search.latency.model import LatencyModel

Array = NDArray[np.float64]


def choose_readings(
    model: LatencyModel, pool: Sequence[ModelConfig], loss: Array, loss_deviation: float | Array, count: int, *,
    seed: int, latency_limit: float | None = None,
) -> list[int]:
    """Indices into `pool` of the `count` best to measure, most valuable first.

    loss: [pool], smaller is better, any unit; loss_deviation: its standard deviation. latency_limit: in the metric's unit;
    candidates that are surely slower are worth little. Each pick lowers the worth of those whose errors go with its own.
    Raises ValueError where the pool is smaller than `count`.
    """
    if len(pool) < count:
        raise ValueError(f"{count} readings are wanted but the pool has {len(pool)} candidates; give a larger pool")
    mean, deviation = model.predict(pool)
    chance = front_chance(np.log(mean), deviation / mean, loss, loss_deviation, np.random.default_rng(seed),
                          None if latency_limit is None else float(np.log(latency_limit)))  # fmt: skip
    correlation = model.correlation(pool)
    unsure = deviation / mean
    picked: list[int] = []
    for _ in range(count):
        worth = unsure * chance
        worth[picked] = -1
        best = int(worth.argmax())
        picked.append(best)
        unsure = unsure * np.sqrt(np.maximum(1 - correlation[best] ** 2, 1e-6))
    return picked


def front_chance(
    latency: Array, latency_deviation: Array, loss: Array, loss_deviation: float | Array, draw: np.random.Generator,
    latency_limit: float | None = None, draws: int = 128,
) -> Array:
    """[pool], from 0 to 1: how often a candidate is undominated (and within the limit) when all values are drawn anew.

    Never exactly 0, so that an unlikely but quite unknown candidate keeps some worth.
    """
    hits = np.zeros(len(latency))
    for _ in range(draws):
        time = latency + latency_deviation * draw.standard_normal(len(latency))
        cost = loss + loss_deviation * draw.standard_normal(len(latency))
        order = np.lexsort((cost, time))
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(cost[order])[:-1]])
        front = order[cost[order] < best_before]
        hits[front if latency_limit is None else front[time[front] <= latency_limit]] += 1
    return (hits + 0.5) / (draws + 1)
