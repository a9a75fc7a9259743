"""A latency model for a new device from a few readings: an older device's model, times a factor, plus what is left.

The order of architectures is steady among devices of a kind, so the old model carries most of what there is to know. Where the
new readings say otherwise, the model for them alone wins the same cross-validation that chooses among all kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from modeling.config import ModelConfig
from search.latency.acquire import front_chance
from search.latency.model import LatencyModel
from search.latency.reading import MIN_READINGS, Key, Reading

USUAL_READINGS = (10, 50)


def transfer(old: LatencyModel, key: Key, readings: Sequence[Reading]) -> LatencyModel:
    """The new device's model. Fidelities of old and new may differ: the new model has that of its readings.

    Raises ValueError where the two are not of the same metric, or the readings are too few or mixed.
    """
    if old.key.metric != key.metric:
        raise ValueError(f"a model of {old.key.metric} says nothing about {key.metric}; give the old device's model of that")
    if len(readings) < MIN_READINGS:
        raise ValueError(f"{len(readings)} readings of the new device are too few; expected {USUAL_READINGS[0]} to "
                         f"{USUAL_READINGS[1]}")  # fmt: skip
    return LatencyModel.fit(key, readings, prior=old)


def first_readings(old: LatencyModel, pool: Sequence[ModelConfig], loss: np.ndarray, count: int, *, seed: int) -> list[int]:
    """Indices into `pool` of what to measure first on a new device: spread over the features, near the front.

    A greedy farthest-point choice in standardised log features, each distance weighted by the chance of being on the front
    that the old device's model gives.
    """
    if len(pool) < count:
        raise ValueError(f"{count} readings are wanted but the pool has {len(pool)} candidates; give a larger pool")
    mean, deviation = old.predict(pool)
    spread = float(np.std(loss)) or 1.0
    draw = np.random.default_rng(seed)
    chance = front_chance(np.log(mean), np.maximum(deviation / mean, 0.1), loss, 0.3 * spread, draw)
    logs = old.inputs(pool)
    place = (logs - logs.mean(axis=0)) / np.maximum(logs.std(axis=0), 1e-9)
    picked = [int(chance.argmax())]
    distance = np.linalg.norm(place - place[picked[0]], axis=1)
    while len(picked) < count:
        worth = distance * np.sqrt(chance)
        worth[picked] = -1
        picked.append(int(worth.argmax()))
        distance = np.minimum(distance, np.linalg.norm(place - place[picked[-1]], axis=1))
    return picked
