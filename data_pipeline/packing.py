"""Which pieces of which documents make up each row.

A piece (begin, length) stands for the inputs token[begin : begin + length] and the labels one further, all inside one
document. A document of n tokens has n - 1 predictions, and each is in exactly one piece.

`best_fit` (Ding et al. 2024, arXiv 2404.10830) cuts a document into pieces of at most a row and puts each remainder
into the fullest row that still has room; `concat` cuts the concatenation of all documents. In both a row never
attends, nor predicts, over a document's border. Conversations are packed by best fit without being cut (`pack_chats`).
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError

_WINDOW = 1 << 20
"""Pieces packed together; bounds the memory and time of best fit."""


@dataclass(frozen=True)
class PackIndex:
    """Row r holds pieces first[r] to first[r + 1]; piece p covers length[p] predictions from token begin[p]."""

    seq_len: int
    first: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    dropped: int = 0
    """Conversations too long for a row that have no turn border to be cut at."""
    cut: int = 0
    """Conversations cut at a turn border."""

    @property
    def rows(self) -> int:
        return len(self.first) - 1

    @property
    def predictions(self) -> int:
        return int(self.length.sum())

    @property
    def padding(self) -> float:
        """Share of the positions that hold no token."""
        return 1.0 - self.predictions / (self.rows * self.seq_len)


def save_index(index: PackIndex, file: Path) -> None:
    """Write an index as `.npz`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.npz")
    try:
        counts = np.array([index.seq_len, index.dropped, index.cut])
        np.savez(temporary, counts=counts, first=index.first, begin=index.begin, length=index.length)
        os.replace(temporary, file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror}); check the space and rights there") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_index(file: Path, tokens: int) -> PackIndex:
    """Read what `save_index` wrote for a shard of `tokens` tokens. The archive's checksums find any change."""
    try:
        with np.load(file, allow_pickle=False) as found:
            seq_len, dropped, cut = found["counts"].tolist()
            index = PackIndex(seq_len, found["first"], found["begin"], found["length"], dropped, cut)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: damaged ({error}); delete it and it is made again") from error
    if len(index.begin) and int((index.begin + index.length).max()) >= tokens:
        raise DataError(f"{file}: points behind the end of its shard; delete it and it is made again")
    return index


def _spans(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and number of predictions of each document."""
    ends = ends.astype(np.int64)
    starts = np.concatenate(([0], ends[:-1]))
    return starts, np.maximum(ends - starts - 1, 0)


def pack(ends: np.ndarray, seq_len: int, mode: str) -> PackIndex:
    """Pack whole documents, given their ends in tokens, into rows of `seq_len` predictions."""
    starts, sizes = _spans(ends)
    return _concat(starts, sizes, seq_len) if mode == "concat" else _cut_and_fit(starts, sizes, seq_len)


def _concat(starts: np.ndarray, sizes: np.ndarray, seq_len: int) -> PackIndex:
    """Borders of pieces are the borders of documents and of rows, both in the numbering of predictions."""
    offsets = np.concatenate(([0], np.cumsum(sizes)))
    total = int(offsets[-1])
    borders = np.union1d(offsets, np.arange(0, total, seq_len))
    begins_at, lengths = borders[:-1], np.diff(borders)
    document = np.searchsorted(offsets, begins_at, side="right") - 1
    begin = starts[document] + begins_at - offsets[document]
    row_count = -(-total // seq_len)
    first = np.searchsorted(begins_at, np.arange(row_count + 1) * seq_len)
    return PackIndex(seq_len, first.astype(np.int64), begin, lengths.astype(np.int32))


def _cut_and_fit(starts: np.ndarray, sizes: np.ndarray, seq_len: int) -> PackIndex:
    pieces = -(-sizes // seq_len)
    document = np.repeat(np.arange(len(sizes)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = starts[document] + number * seq_len
    length = np.minimum(sizes[document] - number * seq_len, seq_len)
    return _fit(begin, length, seq_len)


def _fit(begin: np.ndarray, length: np.ndarray, seq_len: int, dropped: int = 0, cut: int = 0) -> PackIndex:
    """Best-fit decreasing over windows of pieces, all at most a row long."""
    row_of = np.empty(len(length), np.int64)
    rows = 0
    for low in range(0, len(length), _WINDOW):
        window = length[low : low + _WINDOW]
        assigned, used = best_fit_decreasing(window, seq_len)
        row_of[low : low + _WINDOW] = assigned + rows
        rows += used
    order = np.argsort(row_of, kind="stable")
    first = np.searchsorted(row_of[order], np.arange(rows + 1))
    return PackIndex(seq_len, first, begin[order].astype(np.int64), length[order].astype(np.int32), dropped, cut)


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Bin of each item, and the number of bins. Longest first, each into the fullest bin that still has room.

    Bins are kept by their free space; a set of the free spaces in use, as the bits of one integer, finds the best one
    in a few machine operations, so the time grows with the number of items only.
    """
    bin_of = np.empty(len(sizes), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms, used = 0, 0
    order = np.argsort(-sizes.astype(np.int64), kind="stable")
    placed: list[int] = []
    for size in sizes[order].tolist():
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, chosen = capacity, used
            used += 1
        placed.append(chosen)
        left = room - size
        if left:
            by_room[left].append(chosen)
            rooms |= 1 << left
    bin_of[order] = placed
    return bin_of, used


def pack_chats(ends: np.ndarray, mask: np.ndarray, seq_len: int) -> PackIndex:
    """Pack conversations without splitting any; `mask` (bool a token) says what is supervised.

    One that is too long keeps its longest beginning that ends with an assistant's turn and fits, else it is dropped.
    """
    starts, sizes = _spans(ends)
    mask = np.asarray(mask, bool)
    too_long = np.flatnonzero(sizes > seq_len)
    keep = np.ones(len(sizes), bool)
    # A supervised token before an unsupervised one (or the end) closes an assistant's turn.
    closes = np.flatnonzero(mask & ~np.concatenate((mask[1:], [False])))
    for chat in too_long:
        # Predictions 0..size-1 reach token start + size; the closing token must be among those labels.
        low, high = np.searchsorted(closes, [starts[chat] + 1, starts[chat] + seq_len + 1])
        if low == high:
            keep[chat] = False
        else:
            sizes[chat] = closes[high - 1] - starts[chat]
    keep &= sizes > 0
    dropped = int((~keep).sum())
    if not keep.any():
        raise DataError(f"conversations: none fits a row of {seq_len} tokens; expected at least one; raise seq_len")
    return _fit(starts[keep], sizes[keep], seq_len, dropped, len(too_long) - int((~keep[too_long]).sum()))
