"""What a latency model is for, and what it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modeling.config import ModelConfig
from search.devices.base import Fidelity
from search.latency.features import METRICS, UNITS, Metric

Array = NDArray[np.float64]
MIN_READINGS = 10
UNKNOWN_ERROR = 0.005
"""Of a reading whose error nobody knows, as a share of it."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What one model is for."""

    device_class: str
    runtime: str
    threads: int
    metric: Metric
    context: int
    """Tokens of the prompt, or before the decoded one."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric {self.metric!r} is unknown; expected one of {', '.join(METRICS)}")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What was measured of one architecture."""

    config: ModelConfig
    value: float
    """Of the key's metric: ms, or MiB for peak_memory. A median of repeats."""
    std_error: float | None = None
    """Of that value, in its unit; None where it is not known."""
    fidelity: Fidelity


def check_readings(key: Key, readings: Sequence[Reading]) -> None:
    """Raises ValueError for too few, mixed or impossible ones."""
    if len(readings) < MIN_READINGS:
        raise ValueError(f"{len(readings)} readings are too few for a latency model; measure at least {MIN_READINGS}")
    if len(fidelities := sorted({reading.fidelity for reading in readings})) > 1:
        raise ValueError(f"readings of fidelity {' and '.join(fidelities)} cannot be mixed; fit one model for each")
    if wrong := [reading.value for reading in readings if not (np.isfinite(reading.value) and reading.value > 0)]:
        raise ValueError(f"a reading of {key.metric} is {wrong[0]}; expected a value above 0 {UNITS[key.metric]}")


def log_variances(readings: Sequence[Reading]) -> Array:
    """Of the log of each value; where no error is known the median of the others, or half a percent."""
    known = [None if reading.std_error is None else (reading.std_error / reading.value) ** 2 for reading in readings]
    given = [value for value in known if value is not None]
    usual = float(np.median(given)) if given else UNKNOWN_ERROR**2
    return np.maximum([usual if value is None else value for value in known], 1e-6)
