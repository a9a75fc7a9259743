"""The one primitive of evaluation: summed scores of rows of tokens, batched by length, shared out over ranks.

Perplexity, multiple choice, held-out losses of a running stage and lm_eval all come down to `score_rows`. A `Scorer` is
what they need of a model: how it scores tokens, its tokenizer, its longest context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from modeling.decoder import Decoder, spread_logits
from stages.objectives import IGNORE, model_token_nll

TokenScores = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(tokens, positions or None, labels), int64 [B, T] on the CPU -> [B, T], or [B, T, K] for K scores a token.

Labels are what each token must predict, -100 where nothing is counted; positions None is 0..T-1, plain causal.
"""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A model as evaluation sees it. Under FSDP every rank makes one, and all call the same function together."""

    token_nll: TokenScores
    """Negative log-likelihood of each label, in nats."""
    tokenizer: Tokenizer
    context: int
    """Most tokens that the model reads at once."""
    rank: int = 0
    world: int = 1
    max_tokens: int = 4096
    """Tokens (padding included) of one forward pass; a longer row goes alone."""

    def score(self, rows: Sequence[Row]) -> Tensor:
        """Summed negative log-likelihood of each row, in nats, fp64 [len(rows)], the same on every rank."""
        return score_rows(self.token_nll, rows, max_tokens=self.max_tokens, rank=self.rank, world=self.world)


@dataclass(frozen=True)
class Row:
    """Inputs and what each of them must predict, of the same length; -100 where nothing is counted."""

    tokens: Sequence[int]
    labels: Sequence[int]


def rows_of(ids: Sequence[int], counted: Sequence[bool], context: int) -> list[Row]:
    """Rows of at most `context` inputs in which every counted token is predicted exactly once.

    What is longer than the context is read in windows that advance by half of it, the last one moved back to end with
    the text: each counted token behind the first window has at least half a context before it.

    Args:
        ids: the text, from its first token on. That one has nothing before it and is never counted.
        counted: one flag a token: whether it adds to the score.
    """
    if not any(counted[1:]):
        return []
    targets = [token if count else IGNORE for token, count in zip(ids[1:], counted[1:], strict=True)]
    last = max(len(targets) - context, 0)
    starts = [*range(0, last, max(context // 2, 1)), last]
    rows, done = [], 0
    for start in starts:
        end = min(start + context, len(targets))
        labels = [IGNORE] * (done - start) + targets[done:end]
        done = end
        if any(label != IGNORE for label in labels):
            rows.append(Row(ids[start:end], labels))
    return rows


def score_rows(
    token_scores: TokenScores, rows: Sequence[Row], *, max_tokens: int = 4096, rank: int = 0, world: int = 1
) -> Tensor:
    """Each row's scores summed over its counted tokens: fp64 [len(rows)] or [len(rows), K], the same on every rank.

    Every rank makes the same number of forward passes, as FSDP needs; where batches do not come out even, the last one
    is repeated and its result dropped. Rows are padded at their end, which a causal model does not see.
    """
    if not rows:
        return torch.zeros(0, dtype=torch.float64)
    batches = _batches(rows, max_tokens, world)
    mine: list[tuple[list[int], Tensor]] = []
    for index in range(rank, len(batches) + -len(batches) % world, world):
        batch = batches[min(index, len(batches) - 1)]
        tokens, labels = _pad([rows[i] for i in batch])
        scores = token_scores(tokens, None, labels)
        counted = (labels != IGNORE).to(scores.device)
        counted = counted if scores.dim() == 2 else counted.unsqueeze(-1)
        # Where nothing is counted a score may be anything, NaN included.
        sums = torch.where(counted, scores, 0).double().sum(dim=1)
        if index < len(batches):
            mine.append((batch, sums))
        shape = sums.shape[1:]
    result = torch.zeros(len(rows), *shape, dtype=torch.float64)
    for batch, sums in mine:
        result[batch] = sums.cpu()
    if world > 1:
        dist.all_reduce(result)
    return result


def _batches(rows: Sequence[Row], max_tokens: int, world: int) -> list[list[int]]:
    """Indices of rows of like length, longest first, within the budget and enough for all ranks where possible."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens))
    budget = min(max_tokens, -(-sum(len(row.tokens) for row in rows) // world))
    batches: list[list[int]] = []
    for index in order:
        longest = len(rows[batches[-1][0]].tokens) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def _pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    width = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[index, : len(row.labels)] = torch.tensor(row.labels)
    return tokens, labels


def decoder_nll(model: Decoder) -> TokenScores:
    """The `token_nll` of a whole model, on whatever device it is. Logits exist only where something is counted."""

    @torch.inference_mode()
    def token_nll(tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
        device = model.embed.weight.device
        tokens, labels = tokens.to(device), labels.to(device)
        positions = None if positions is None else positions.to(device)
        return model_token_nll(model, tokens, positions, labels)

    return token_nll


def decoder_nll_and_misses(model: Decoder, chunk: int = 256) -> TokenScores:
    """As `decoder_nll`, with a second score: 1 where the label is not the model's likeliest token. [B, T, 2]."""

    def chunks(labels: Tensor) -> Iterator[Tensor]:
        yield from (labels.reshape(-1) != IGNORE).nonzero().squeeze(-1).split(chunk)

    @torch.inference_mode()
    def scores(tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
        device = model.embed.weight.device
        tokens, labels = tokens.to(device), labels.to(device)
        hidden, weight = model.head_operands(model.hidden(tokens, positions))
        hidden, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        result = torch.zeros(len(flat), 2, dtype=torch.float32, device=device)
        for part in chunks(labels):
            logits = spread_logits((hidden[part] @ weight.T).float(), model.config)
            picked = logits.gather(-1, flat[part].unsqueeze(-1)).squeeze(-1)
            result[part, 0] = logits.logsumexp(dim=-1) - picked
            result[part, 1] = (picked < logits.amax(dim=-1)).float()
        return result.view(*labels.shape, 2)

    return scores
