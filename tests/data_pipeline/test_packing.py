"""Rows made of pieces of documents: nothing lost, nothing twice."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.packing import PackIndex, best_fit_decreasing, pack, pack_chats


def covered(index: PackIndex) -> list[int]:
    """Positions of all input tokens in the index, sorted."""
    return sorted(p for b, n in zip(index.begin, index.length, strict=True) for p in range(b, b + n))


@pytest.mark.parametrize("mode", ["best_fit", "concat"])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 100])
def test_every_prediction_is_in_exactly_one_piece(mode: str, seq_len: int) -> None:
    lengths = np.random.default_rng(seq_len).integers(1, 50, 200)
    ends = np.cumsum(lengths).astype(np.uint64)
    index = pack(ends, seq_len, mode)
    # The last token of a document predicts nothing; every other position predicts the next.
    assert covered(index) == sorted(set(range(int(ends[-1]))) - {int(end) - 1 for end in ends})
    fill = np.add.reduceat(index.length, index.first[:-1])
    assert (fill <= seq_len).all() and (index.length > 0).all() and index.first[-1] == len(index.length)
    document = np.searchsorted(ends, index.begin, side="right")
    assert (index.begin + index.length < ends[document]).all(), "a piece and its last label lie in one document"
    if mode == "concat":
        assert (fill[:-1] == seq_len).all()


def test_best_fit_keeps_documents_whole_that_fit_a_row() -> None:
    lengths = np.random.default_rng(0).integers(2, 18, 300)
    index = pack(np.cumsum(lengths), 16, "best_fit")
    assert sorted(index.length.tolist()) == sorted((lengths - 1).tolist())


def test_best_fit_is_the_textbook_algorithm() -> None:
    sizes = np.random.default_rng(3).integers(1, 33, 400)
    bins: list[int] = []
    for size in sorted(sizes.tolist(), reverse=True):
        fitting = [b for b in range(len(bins)) if bins[b] >= size]
        if fitting:
            bins[min(fitting, key=lambda b: bins[b])] -= size
        else:
            bins.append(32 - size)
    assigned, used = best_fit_decreasing(sizes, 32)
    assert used == len(bins)
    assert sorted(32 - np.bincount(assigned, weights=sizes)) == sorted(bins)


def test_padding_is_small_on_many_documents() -> None:
    lengths = np.random.default_rng(1).lognormal(6.5, 1.0, 100_000).astype(np.int64) + 2
    assert pack(np.cumsum(lengths), 2048, "best_fit").padding < 0.005


def chat_ends(turns: list[list[tuple[int, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """Ends and mask of chats given as runs of (tokens, supervised)."""
    mask = [flag for chat in turns for count, flag in chat for _ in range(count)]
    return np.cumsum([sum(count for count, _ in chat) for chat in turns]), np.array(mask)


def test_a_conversation_that_is_too_long_ends_at_an_assistants_turn_or_is_dropped() -> None:
    short = [(3, False), (2, True)]
    two_turns = [(4, False), (3, True), (4, False), (6, True)]
    long_answer = [(4, False), (30, True)]
    ends, mask = chat_ends([short, two_turns, long_answer])
    index = pack_chats(ends, mask, 10)
    assert (index.cut, index.dropped) == (1, 1)
    assert sorted(zip(index.begin.tolist(), index.length.tolist(), strict=True)) == [(0, 4), (5, 6)]
    # A row of just the right length takes the second turn as well.
    assert sorted(pack_chats(ends, mask, 16).length.tolist()) == [4, 16]


def test_a_cut_may_end_exactly_at_the_rows_last_label() -> None:
    ends, mask = chat_ends([[(4, False), (3, True), (9, False), (9, True)]])
    assert pack_chats(ends, mask, 6).length.tolist() == [6]
    with pytest.raises(DataError, match="raise seq_len"):
        pack_chats(ends, mask, 5)
