"""The primitive: every counted token exactly once, whatever the batch, the window and the number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.init import init_weights
from stages.scoring import Row, decoder_nll, decoder_nll_and_misses, rows_of, score_rows

CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48, head_dim=16, init_std=0.3,
)  # fmt: skip


def decoder() -> Decoder:
    model = Decoder(CONFIG).eval()
    init_weights(model, 0)
    return model


def random_rows(count: int, seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(1, 30, (), generator=generator))
        tokens = torch.randint(0, 50, (length + 1,), generator=generator).tolist()
        kept = torch.rand(length, generator=generator) < 0.6
        rows.append(Row(tokens[:-1], [t if k else -100 for t, k in zip(tokens[1:], kept.tolist(), strict=True)]))
    return rows


def one_by_one(model: Decoder, rows: list[Row]) -> torch.Tensor:
    """The reference: a row alone, logits as a whole, log-softmax in fp64."""
    sums = []
    for row in rows:
        with torch.no_grad():
            log_p = F.log_softmax(model(torch.tensor([row.tokens]))[0].double(), dim=-1)
        sums.append(-sum(log_p[t, label].item() for t, label in enumerate(row.labels) if label >= 0))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("max_tokens", [1, 64, 4096])
def test_batched_scores_are_those_of_each_row_alone_in_the_order_given(max_tokens: int) -> None:
    model, rows = decoder(), random_rows(25)
    found = score_rows(decoder_nll(model), rows, max_tokens=max_tokens)
    torch.testing.assert_close(found, one_by_one(model, rows), rtol=1e-5, atol=1e-5)


def test_a_second_score_tells_where_the_likeliest_token_was_another() -> None:
    model, rows = decoder(), random_rows(12)
    greedy = model(torch.tensor([rows[0].tokens]))[0].argmax(-1).tolist()
    rows.append(Row(rows[0].tokens, greedy))
    found = score_rows(decoder_nll_and_misses(model), rows)
    torch.testing.assert_close(found[:, 0], one_by_one(model, rows), rtol=1e-5, atol=1e-5)
    assert found[-1, 1] == 0
    assert found[:-1, 1].sum() > 0


@pytest.mark.parametrize("length", [2, 8, 9, 10, 13, 17, 40])
@pytest.mark.parametrize("context", [1, 2, 8])
def test_windows_count_every_flagged_token_once_with_enough_before_it(length: int, context: int) -> None:
    ids = list(range(100, 100 + length))
    counted = [index % 3 != 1 for index in range(length)]
    rows = rows_of(ids, counted, context)
    seen = [label for row in rows for label in row.labels if label != -100]
    assert seen == [token for token, count in zip(ids[1:], counted[1:], strict=True) if count]
    for row in rows:
        assert len(row.tokens) == len(row.labels) <= context
        for index, label in enumerate(row.labels):
            if label != -100:
                assert label == row.tokens[index] + 1  # predicted from the token just before it
                assert index + 1 >= min(label - 100, math.ceil(context / 2))


def test_a_text_that_fits_is_one_row_and_one_without_counted_tokens_none() -> None:
    assert rows_of([5, 6, 7], [False, True, True], 8) == [Row([5, 6], [6, 7])]
    assert rows_of([5, 6, 7], [True, False, False], 8) == []
    assert rows_of([], [], 8) == []


def test_scores_where_nothing_is_counted_do_not_matter_even_when_they_are_nan() -> None:
    def scores(tokens: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        return torch.where(labels == -100, torch.nan, tokens.float())

    rows = [Row([1, 2, 3], [-100, 7, -100]), Row([4], [9])]
    assert score_rows(scores, rows).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_ranks_share_the_rows_with_equal_numbers_of_forward_passes(
    world: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, calls = decoder(), random_rows(count), [0] * world
    # Each rank's part before the sum over ranks, which is then taken here.
    monkeypatch.setattr("stages.scoring.dist.all_reduce", lambda result: None)

    def part(rank: int) -> torch.Tensor:
        def counting(tokens: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
            calls[rank] += 1
            return decoder_nll(model)(tokens, positions, labels)

        return score_rows(counting, rows, max_tokens=40, rank=rank, world=world)

    parts = torch.stack([part(rank) for rank in range(world)])
    torch.testing.assert_close(parts.sum(0), one_by_one(model, rows), rtol=1e-5, atol=1e-5)
    assert len(set(calls)) == 1, f"ranks made {calls} forward passes"
    assert ((parts != 0).sum(0) <= 1).all()
