"""What a page shows beside a latency model's report: readings against held-out predictions, and mere counts in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from search.latency.features import proxies
from search.latency.gates import errors

if TYPE_CHECKING:
    from search.latency.model import LatencyModel


def evidence(model: LatencyModel) -> dict[str, Any]:
    """`held_out`, pairs of what was read and what the model says without that reading's fold, and `proxies`: by name of a
    count (parameters, FLOPs) how well it ranks the same readings. Values for JSON, in the metric's unit, with five digits:
    an event of 400 readings stays below 8 kB."""
    values, predicted = model.held_out()
    counts = [proxies(reading.config, model.key.metric, model.key.context) for reading in model.readings]
    return {"held_out": [[_short(a), _short(b)] for a, b in zip(values, predicted, strict=True)],
            "proxies": {name: _ranks(values, np.array([row[name] for row in counts], dtype=np.float64))
                        for name in counts[0]}}  # fmt: skip


def _ranks(values: Any, counts: Any) -> Mapping[str, float]:
    """A count has no unit of time: only its order can be compared."""
    found = errors(values, counts)
    return {name: round(found[name], 4) for name in ("spearman", "kendall")}


def _short(value: float) -> float:
    return float(f"{value:.5g}")
