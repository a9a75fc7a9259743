"""Which tokens a trimmed head must be able to say: those that the text it is trained for asks of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from data_pipeline.loader import IGNORE, BatchLoader
from data_pipeline.prepare import PreparedStage


class OutputTokens(NamedTuple):
    """The choice, and how much of the text it can say."""

    ids: tuple[int, ...]
    """Ascending."""
    coverage: float
    """Share of the supervised tokens that are among them."""


def frequent_outputs(
    data: PreparedStage, vocab_size: int, count: int, *, always: tuple[int, ...] = (), max_rows: int = 4096
) -> OutputTokens:
    """The `count` tokens that occur most often where `data` is supervised (an assistant's text), and `always`.

    Llama Guard 3-1B-INT4 keeps the handful that its verdicts are made of (arXiv 2411.17713). Fewer than `count` where the
    text has fewer; at most `max_rows` rows are counted, in the mixture's order.

    Raises ValueError for a count below one.
    """
    if count < 1:
        raise ValueError(f"a head of {count} tokens; expected at least 1")
    rows = min(max_rows, sum(source.index.rows for source in data.sources))
    batches = BatchLoader(data, seed=0, global_batch=rows, micro_batch=256).build_step(0)
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches:
        seen += torch.bincount(batch.labels[batch.labels != IGNORE], minlength=vocab_size)
    order = torch.sort(seen, descending=True, stable=True).indices.tolist()
    frequent = [token for token in order if seen[token] > 0 and token not in always]
    kept = sorted({*always, *frequent[: max(count - len(always), 0)]})
    return OutputTokens(tuple(kept), float(seen[kept].sum() / seen.sum().clamp(min=1)))
