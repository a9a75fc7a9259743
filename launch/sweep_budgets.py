"""What a search's record says of its short trainings: how they rank, and which trials have no other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.sweep_data import Metric, Ranking

if TYPE_CHECKING:
    from search.quality import RankAgreement
    from search.records import Trial


def ranking_of(agreement: RankAgreement, loss: Metric) -> Ranking | None:
    """Of the trials that have both losses; None where there are none."""
    import numpy as np

    from search.latency.gates import errors

    pairs = tuple(agreement.pairs.values())
    if not pairs:
        return None
    kendall, spearman = agreement.tau, math.nan
    if len(pairs) > 1:
        short, full = np.array(pairs, dtype=np.float64).T
        spearman = errors(full, short)["spearman"]
    return Ranking(label="short training against the full one", metric=loss, pairs=pairs,
                   kendall=kendall if math.isfinite(kendall) else None, spearman=spearman if math.isfinite(spearman) else None)


def short_notes(short_tokens: int, trials: Sequence[Trial], agreement: RankAgreement) -> list[str]:
    """Lines for the page; none where the search has one budget."""
    if not short_tokens:
        return []
    said = [agreement.explain()]
    alone = [trial for trial in trials if "predicted_loss" in (trial.results or {})]
    if alone:
        numbers = ", ".join(str(trial.number) for trial in alone)
        spread = sorted(trial.noise["predicted_loss"] for trial in alone)[len(alone) // 2]
        said.append(f"Trained on {short_tokens:,} tokens alone, their loss predicted from that (deviation {spread:.3f}, the "
                    f"median) and never on the front: trials {numbers}.")  # fmt: skip
    return said
