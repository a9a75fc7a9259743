"""Perplexity, multiple choice and the loss on conversations, of any `Scorer`: a loaded model or a running stage.

Rules
- Text: each document alone, after the tokenizer's BOS (else its EOS, as lm_eval does; a tokenizer without either leaves
  the first token out). All its tokens are counted; no EOS is added. Longer than the context: see `scoring.rows_of`.
  Words are what whitespace separates, bytes those of the UTF-8 text.
- Multiple choice: the choice with the highest summed log-likelihood (`acc`), or with the highest per character of the
  text that is scored, surrounding blanks left out (`acc_norm`, lm_eval's rule). The first of equals wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.chat import Message, render_batch
from data_pipeline.tasks import ChoiceItem, read_choice_items
from data_pipeline.tokenizer import Tokenizer
from stages.errors import InputError
from stages.scoring import Row, Scorer, rows_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_EXPONENT = 700.0
"""Beyond it exp() overflows; a text of one very long "word" gets there."""


def perplexity(scorer: Scorer, texts: Sequence[str]) -> dict[str, float]:
    """`word_perplexity`, `bits_per_byte`, `loss` (nats a token) and `n` (documents).

    Raises InputError where there is no text at all.
    """
    words = sum(len(text.split()) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    rows = [row for ids in scorer.tokenizer.encode_batch(texts) for row in text_rows(scorer, ids)]
    tokens = sum(label >= 0 for row in rows for label in row.labels)
    if not words or not tokens:
        raise InputError(f"{len(texts)} documents hold no words; expected text to score")
    total = float(scorer.score(rows).sum())
    return {
        "word_perplexity": math.exp(min(total / words, MAX_EXPONENT)),
        "bits_per_byte": total / math.log(2) / size,
        "loss": total / tokens,
        "n": len(texts),
    }


def text_rows(scorer: Scorer, ids: list[int]) -> list[Row]:
    """Rows that count every token of one document."""
    prefix = prefix_ids(scorer.tokenizer)
    return rows_of(prefix + ids, [False] * len(prefix) + [True] * len(ids), scorer.context)


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """What a text is read after: BOS, else EOS, else nothing."""
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [] if first is None else [first]


def chat_loss(scorer: Scorer, chats: Sequence[Sequence[Message]]) -> dict[str, float]:
    """`loss` in nats a supervised token (assistants' text and their end of turn) and `n_tokens`, their number.

    Raises InputError where no conversation holds anything supervised.
    """
    rendered = render_batch(scorer.tokenizer, chats)
    rows = [row for ids, mask in rendered for row in rows_of(ids, mask, scorer.context)]
    tokens = sum(label >= 0 for row in rows for label in row.labels)
    if not tokens:
        raise InputError(f"{len(chats)} conversations hold no assistant text; expected some to score")
    return {"loss": float(scorer.score(rows).sum()) / tokens, "n_tokens": tokens}


def multiple_choice(
    scorer: Scorer, items: Sequence[ChoiceItem], *, few_shot: Sequence[ChoiceItem] = ()
) -> dict[str, float]:
    """`acc`, `acc_norm` and `n`.

    Args:
        few_shot: solved examples that go before an item of the same subject, as many as the context has room for.
    """
    if not items:
        raise InputError("no multiple-choice items to score; expected at least one")
    pairs = [pair for item in items for pair in choice_pairs(item)]
    shots = [_solved(item, few_shot) for item in items for _ in item.choices]
    totals = score_pairs(scorer, pairs, shots)
    right = normed_right = start = 0
    for item in items:
        part = slice(start, start + len(item.choices))
        lengths = [max(len(continuation.strip()), 1) for _, continuation in pairs[part]]
        right += _best(totals[part]) == item.answer_index
        normed_right += _best([t / n for t, n in zip(totals[part], lengths, strict=True)]) == item.answer_index
        start += len(item.choices)
    return {"acc": right / len(items), "acc_norm": normed_right / len(items), "n": len(items)}


def _best(log_likelihoods: Sequence[float]) -> int:
    return max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)


def few_shot_items(task_file: Path) -> list[ChoiceItem]:
    """Solved examples that lie beside a task's file (`mmlu_dev_fewshot.jsonl` beside `mmlu.jsonl`); none is fine."""
    name = task_file.name.partition(".")[0]
    found = sorted(task_file.parent.glob(f"{name}_dev_fewshot.*"))
    return read_choice_items(found[0]) if found else []


def choice_pairs(item: ChoiceItem) -> list[tuple[str, str]]:
    """(what is given, what is scored) of each choice, by the rule of the item's task.

    HellaSwag continues its question; WinoGrande scores what follows the blank, given the sentence filled in; MMLU lists
    the choices and scores a letter (Hendrycks et al. 2021, arXiv 2009.03300); all others are question and answer text.
    """
    if item.task == "hellaswag":
        return [(item.question.rstrip(), f" {choice.strip()}") for choice in item.choices]
    if item.task == "winogrande":
        before, blank, after = item.question.partition("_")
        if not blank or not after.strip():
            raise InputError(f"winogrande item {item.id}: expected a sentence with `_` and text after it")
        return [(before + choice.strip(), after.rstrip()) for choice in item.choices]
    if item.task == "mmlu":
        if len(item.choices) > len(LETTERS):
            raise InputError(f"mmlu item {item.id} has {len(item.choices)} choices; expected at most {len(LETTERS)}, one for "
                             "each letter; take some away")
        return [(_lettered(item), f" {LETTERS[index]}") for index in range(len(item.choices))]
    context = f"{item.context.strip()}\n" if item.context.strip() else ""
    question = item.question.strip()
    if item.task == "boolq" and not question.endswith("?"):
        question += "?"  # the set's questions are search queries; lm_eval's prompt adds the mark too
    return [(f"{context}Question: {question}\nAnswer:", f" {choice.strip()}") for choice in item.choices]


def _lettered(item: ChoiceItem) -> str:
    listed = [f"{LETTERS[index]}. {choice.strip()}" for index, choice in enumerate(item.choices)]
    return "\n".join([item.question.strip(), *listed, "Answer:"])


def _solved(item: ChoiceItem, few_shot: Sequence[ChoiceItem]) -> list[str]:
    """Solved examples of the item's subject, each a text."""
    same = [other for other in few_shot if other.subject == item.subject]
    return ["".join(choice_pairs(other)[other.answer_index]) + "\n\n" for other in same]


def score_pairs(
    scorer: Scorer, pairs: Sequence[tuple[str, str]], shots: Sequence[Sequence[str]] | None = None
) -> list[float]:
    """Log-likelihood in nats of each continuation, given its context and the examples before it."""
    rows: list[Row] = []
    owners: list[int] = []
    for index, (given, scored) in enumerate(pairs):
        mine = _pair_rows(scorer, given, scored, shots[index] if shots else ())
        rows += mine
        owners += [index] * len(mine)
    totals = [0.0] * len(pairs)
    for owner, value in zip(owners, scorer.score(rows).tolist(), strict=True):
        totals[owner] -= value
    return totals


def _pair_rows(scorer: Scorer, given: str, scored: str, shots: Sequence[str]) -> list[Row]:
    """Rows of one continuation; examples, then the context's beginning, give way where the model's context is short."""
    for first in range(len(shots) + 1):
        context, continuation = encode_pair(scorer.tokenizer, "".join(shots[first:]) + given, scored)
        if len(context) + len(continuation) <= scorer.context:
            break
    return pair_rows(scorer, context, continuation)


def pair_rows(scorer: Scorer, context: list[int], continuation: list[int]) -> list[Row]:
    """Rows that count the continuation's tokens, after BOS (or EOS) and the end of what is given."""
    prefix = prefix_ids(scorer.tokenizer)
    room = scorer.context + 1 - len(prefix) - len(continuation)
    kept = context[-room:] if room > 0 else []
    counted = [False] * (len(prefix) + len(kept)) + [True] * len(continuation)
    return rows_of([*prefix, *kept, *continuation], counted, scorer.context)


def encode_pair(tokenizer: Tokenizer, given: str, scored: str) -> tuple[list[int], list[int]]:
    """Ids of both, encoded as one text and cut where the context's own ids end (blanks go to the continuation).

    Where the cut falls inside a token, that token belongs to the continuation.
    """
    stripped = given.rstrip()
    whole = tokenizer.encode(given + scored)
    context = tokenizer.encode(stripped)
    shared = 0
    while shared < min(len(context), len(whole) - 1) and context[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]
