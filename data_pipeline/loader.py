"""Batches in the order of one integer, put together by a thread while the model computes."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import DataError
from data_pipeline.prepare import PreparedStage

logger = logging.getLogger(__name__)

IGNORE = -100
_AHEAD = 2
"""Optimizer steps prepared ahead."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass: int64 tensors [B, T], and [B] for `source`.

    labels[b, t] is what tokens[b, t] must predict (already shifted), -100 where there is no loss. positions restart at
    0 with every document; padding is positions 0, 0, 0, ... source[b] is the number of the row's source.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    source: torch.Tensor

    @property
    def supervised_tokens(self) -> int:
        """Predictions that carry a loss."""
        return int((self.labels != IGNORE).sum())


def build_batch(prepared: PreparedStage, sources: np.ndarray, rows: np.ndarray) -> Batch:
    """Put together the given rows of the given sources."""
    shape = (len(rows), prepared.seq_len)
    tokens = np.full(shape, prepared.pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    positions = np.zeros(shape, np.int64)
    counting = np.arange(prepared.seq_len)
    for b, (number, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
        source = prepared.sources[number]
        shard, index = source.shard, source.index
        pieces = slice(int(index.first[row]), int(index.first[row + 1]))
        at = 0
        for begin, length in zip(index.begin[pieces].tolist(), index.length[pieces].tolist(), strict=True):
            span = shard.tokens[begin : begin + length + 1]
            stop = at + length
            tokens[b, at:stop] = span[:-1]
            labels[b, at:stop] = span[1:]
            positions[b, at:stop] = counting[:length]
            if shard.mask is not None:
                labels[b, at:stop][~shard.mask_bits(begin + 1, begin + length + 1)] = IGNORE
            at = stop
    return Batch(*(torch.from_numpy(array) for array in (tokens, labels, positions, sources.astype(np.int64))))


class BatchLoader:
    """This rank's batches, step by step. The only state is `position`, the global number of the next sequence.

    Rank r of R takes rows [r * B / R, (r + 1) * B / R) of every global batch of B, so the order does not depend on R.
    """

    def __init__(
        self,
        prepared: PreparedStage,
        *,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int = 0,
        start_sequence: int = 0,
    ) -> None:
        if world < 1 or not 0 <= rank < world or global_batch < 1 or global_batch % world:
            raise DataError(
                f"global_batch={global_batch} over {world} workers (rank {rank}): expected a multiple of the workers; "
                "change global_batch or the number of workers"
            )
        if micro_batch < 0 or start_sequence < 0:
            raise DataError(f"micro_batch={micro_batch}, start_sequence={start_sequence}: expected 0 or more")
        self._prepared = prepared
        self._mixture = prepared.mixture(seed)
        self._global_batch = global_batch
        self._share = global_batch // world
        self._offset = rank * self._share
        self._micro = min(micro_batch or self._share, self._share)
        self.position = start_sequence
        self._queue: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def build_step(self, start: int) -> list[Batch]:
        """The micro-batches of the optimizer step whose global batch begins at sequence `start`."""
        sources, rows = self._mixture.lookup(start + self._offset, self._share)
        cuts = range(0, self._share, self._micro)
        return [build_batch(self._prepared, sources[i : i + self._micro], rows[i : i + self._micro]) for i in cuts]

    def _produce(self, start: int) -> None:
        while not self._stopped.is_set():
            try:
                item: Any = self.build_step(start)
            except BaseException as error:  # handed to the caller of next_step, in its thread
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            start += self._global_batch

    def next_step(self) -> list[Batch]:
        """The next optimizer step's micro-batches of this rank; advances `position` by the global batch."""
        if self._stopped.is_set():
            raise RuntimeError("the loader is closed")
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, args=(self.position,), name="batches", daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.position += self._global_batch
        return item

    def close(self) -> None:
        """Stop the thread. The loader gives nothing after it."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
