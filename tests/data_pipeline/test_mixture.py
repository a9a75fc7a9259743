"""The order of sequences, from one integer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.mixture import BLOCK, Mixture, permute, quantise

# Phase 2 of MobileLLM-R1's pre-training (arXiv 2509.24945, README of its repository), per cent.
R1_PHASE_2 = [54.83, 0.52, 23.33, 1.32, 0.14, 0.86, 1.26, 8.01, 3.18, 3.01, 2.70, 0.72, 0.08, 0.03]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1000, 1025])
def test_each_epoch_is_a_permutation_and_another_one(size: int) -> None:
    items = np.arange(size)
    orders = [permute(items, size, seed=3, source=1, epoch=np.full(size, epoch)) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    if size > 16:
        assert (orders[0] != orders[1]).any() and (orders[1] != orders[2]).any() and (orders[0] != items).any()


def test_permutations_of_the_same_size_differ_by_seed_and_by_source() -> None:
    items, zero = np.arange(200), np.zeros(200, np.int64)
    orders = [permute(items, 200, seed=s, source=n, epoch=zero).tolist() for s, n in ((0, 0), (0, 1), (1, 0), (-1, 0))]
    assert len({tuple(order) for order in orders}) == 4


def test_published_weights_are_met_exactly_in_a_block_and_closely_before_its_end() -> None:
    shares = quantise(R1_PHASE_2)
    exact = np.array(R1_PHASE_2) / math.fsum(R1_PHASE_2)
    assert shares.sum() == BLOCK and (np.abs(shares / BLOCK / exact - 1) < 0.02).all()
    sources, _ = Mixture([10] * 14, [(0, R1_PHASE_2)], seed=5).lookup(0, 3 * BLOCK)
    counts = np.cumsum(sources[:, None] == np.arange(14), axis=0)
    assert (counts[BLOCK - 1] == shares).all() and (counts[-1] == 3 * shares).all()
    expected = np.arange(1, 3 * BLOCK + 1)[:, None] * shares / BLOCK
    assert np.abs(counts - expected).max() <= 5


def test_a_source_of_almost_no_weight_still_gets_a_sequence_a_block() -> None:
    assert quantise([1e9, 1.0, 1.0]).tolist() == [BLOCK - 2, 1, 1]


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_weights_that_are_not_positive_numbers_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="positive"):
        quantise(weights)


def test_looking_up_in_pieces_gives_the_same_as_at_once_over_blocks_and_phases() -> None:
    phases = [(0, [3.0, 1.0, 0.5]), (70_001, [1.0, 5.0, 1.0])]
    mixture = Mixture([97, 31, 1000], phases, seed=7)
    whole = mixture.lookup(60_000, 80_000)
    rng = np.random.default_rng(0)
    for start in rng.integers(60_000, 139_000, 20).tolist():
        sources, rows = Mixture([97, 31, 1000], phases, seed=7).lookup(start, 333)
        assert (sources == whole[0][start - 60_000 :][:333]).all() and (rows == whole[1][start - 60_000 :][:333]).all()


def test_every_pass_reads_each_row_once_also_over_a_change_of_weights() -> None:
    mixture = Mixture([97, 31], [(0, [3.0, 1.0]), (150, [1.0, 4.0])], seed=1)
    sources, rows = mixture.lookup(0, 2000)
    for number, size in enumerate((97, 31)):
        mine = rows[sources == number]
        passes = [mine[i : i + size].tolist() for i in range(0, len(mine) - size + 1, size)]
        assert len(passes) > 3 and all(sorted(order) == list(range(size)) for order in passes)
        assert len({tuple(order) for order in passes}) == len(passes)
    assert mixture.counts(2000).tolist() == np.bincount(sources).tolist()
    assert mixture.counts(150).tolist() == np.bincount(sources[:150]).tolist()


def test_a_source_repeated_forty_times_is_shuffled_anew_each_time() -> None:
    _, rows = Mixture([50], [(0, [1.0])], seed=2).lookup(0, 2000)
    assert len({tuple(rows[i : i + 50].tolist()) for i in range(0, 2000, 50)}) == 40


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64, 2**65 + 3])
def test_no_seed_is_too_large_or_too_small(seed: int) -> None:
    _, rows = Mixture([50], [(0, [1.0])], seed=seed).lookup(0, 50)
    assert sorted(rows.tolist()) == list(range(50))
