"""One fitted kind of latency model: what has to be kept to predict with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.latency.gaussian import GaussianProcess

Array = NDArray[np.float64]


@dataclass
class Part:
    """What was fitted of one kind."""

    floor: float
    weights: Array | None = None
    shift: float = 0.0
    spread: float = 0.0
    process: GaussianProcess | None = None

    def state(self) -> dict[str, Any]:
        return {"floor": self.floor, "weights": None if self.weights is None else self.weights.tolist(),
                "shift": self.shift, "spread": self.spread,
                "process": None if self.process is None else self.process.state()}  # fmt: skip

    @classmethod
    def load(cls, state: dict[str, Any]) -> Part:
        weights = None if state["weights"] is None else np.array(state["weights"], dtype=np.float64)
        return cls(float(state["floor"]), weights, float(state["shift"]), float(state["spread"]))
