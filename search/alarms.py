"""Predictions that came out wrong: what the latency model said of a trial before it was measured, against what it took.

Gates are judged on readings at random; a search goes where the model is least sure. So every prediction is checked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from search.store import Store

log = logging.getLogger(__name__)
LIMIT = 0.1
"""Farther off than this share of what was measured, a prediction raises an alarm."""


@dataclass(frozen=True)
class Miss:
    """A trial's prediction against what was measured."""

    trial: int
    predicted: float
    measured: float

    @property
    def off(self) -> float:
        """As a share of what was measured: 0.1 is 10 % too much."""
        return self.predicted / self.measured - 1


def check_predictions(store: Store, metric: str) -> list[Miss]:
    """Of all trials that were predicted and then measured, each architecture once."""
    predicted = {event.detail["key"]: event.detail[metric] for event in reversed(store.events("predicted"))
                 if metric in event.detail}  # fmt: skip
    measured = [(trial, (trial.results or {}).get(metric)) for trial in store.trials("ok") if trial.duplicate_of is None]
    return [Miss(trial.number, predicted[trial.key], value) for trial, value in measured if value and trial.key in predicted]


def raise_alarms(store: Store, metrics: Iterable[str], limit: float = LIMIT) -> list[tuple[str, Miss]]:
    """Note every trial that was farther off than `limit` as an event `mispredicted`, once a metric; the new ones."""
    told = {(event.detail["metric"], event.trial) for event in store.events("mispredicted")}
    found = [(metric, miss) for metric in metrics for miss in check_predictions(store, metric)
             if abs(miss.off) > limit and (metric, miss.trial) not in told]  # fmt: skip
    with store.transaction():
        for metric, miss in found:
            store.event("mispredicted", trial=miss.trial, metric=metric, predicted=miss.predicted, measured=miss.measured,
                        off=miss.off)  # fmt: skip
    for metric, miss in found:
        log.warning("trial %d: %s was predicted as %.4g and measured as %.4g (%+.0f %%); the model learns of it", miss.trial,
                    metric, miss.predicted, miss.measured, 100 * miss.off)  # fmt: skip
    return found
