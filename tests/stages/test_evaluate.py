"""Perplexity and multiple choice, against sums written out by hand over the whole model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from data_pipeline.chat import render
from data_pipeline.tasks import ChoiceItem
from data_pipeline.tokenizer import Tokenizer
from modeling.config import ModelConfig
from modeling.decoder import Decoder
from modeling.init import init_weights
from stages.errors import InputError
from stages.evaluate import (
    chat_loss,
    choice_pairs,
    encode_pair,
    few_shot_items,
    multiple_choice,
    perplexity,
    score_pairs,
)
from stages.scoring import Scorer, decoder_nll

TEXTS = ["The cat sat on the mat.", "Zwölf Boxkämpfer jagen Viktor\nquer über den Sylter Deich", "a  b"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 20, 300)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, ffn_size=48,
        head_dim=16, init_std=0.3,
    )  # fmt: skip
    model = Decoder(config).eval()
    init_weights(model, 0)
    return model


@pytest.fixture
def scorer(model: Decoder, tokenizer: Tokenizer) -> Scorer:
    return Scorer(token_nll=decoder_nll(model), tokenizer=tokenizer, context=128)


@torch.no_grad()
def log_likelihood(model: Decoder, ids: list[int], first: int) -> float:
    """Of ids[first:], given what is before."""
    log_p = F.log_softmax(model(torch.tensor([ids[:-1]]))[0].double(), dim=-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids)))


def test_perplexity_counts_every_token_of_each_document_alone_after_bos(
    model: Decoder, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    assert tokenizer.bos_id is not None
    encoded = [tokenizer.encode(text) for text in TEXTS]
    nll = -sum(log_likelihood(model, [tokenizer.bos_id, *ids], 1) for ids in encoded)
    found = perplexity(scorer, TEXTS)
    assert found["n"] == 3
    assert found["loss"] == pytest.approx(nll / sum(map(len, encoded)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / len("".join(TEXTS).encode()), rel=1e-5)
    words = 6 + 9 + 2
    assert found["word_perplexity"] == pytest.approx(math.exp(nll / words), rel=1e-4)


def test_a_document_longer_than_the_context_is_read_in_strided_windows(
    model: Decoder, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    context = 10
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXTS[1])]
    total, done = 0.0, 1
    for start in [*range(0, len(ids) - 1 - context, context // 2), len(ids) - 1 - context]:
        window = ids[start : start + context + 1]
        total -= log_likelihood(model, window, done - start)
        done = start + len(window)
    assert done == len(ids)
    found = perplexity(replace(scorer, context=context), [TEXTS[1]])
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_a_text_without_words_is_refused(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="no words"):
        perplexity(scorer, [" ", ""])


def test_a_single_endless_word_has_a_finite_perplexity(scorer: Scorer) -> None:
    assert math.isfinite(perplexity(scorer, ["x" * 2000])["word_perplexity"])


def test_the_loss_on_chats_is_over_assistant_text_and_its_end(
    model: Decoder, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    chats = [
        [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "the mat"}],
        [{"role": "user", "content": "the"}, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "b"}],
    ]
    total = count = 0.0
    for chat in chats:
        ids, mask = render(tokenizer, chat)
        kept = [i for i, counted in enumerate(mask) if counted]
        total -= sum(log_likelihood(model, ids[: i + 1], i) for i in kept)
        count += len(kept)
    found = chat_loss(scorer, chats)
    assert found["n_tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(InputError, match="no assistant text"):
        chat_loss(scorer, [[{"role": "user", "content": "cat?"}]])


def item(**fields: object) -> ChoiceItem:
    base: dict[str, object] = dict(id="1", context="", question="Where is the cat?", choices=("a mat", "on the dike "),
                                   answer_index=1)  # fmt: skip
    return ChoiceItem(**{**base, **fields})  # type: ignore[arg-type]


def test_questions_are_scored_by_the_text_of_their_answers() -> None:
    assert choice_pairs(item()) == [
        ("Question: Where is the cat?\nAnswer:", " a mat"), ("Question: Where is the cat?\nAnswer:", " on the dike"),
    ]  # fmt: skip
    given, scored = choice_pairs(item(context="A passage.", question="is it", choices=("yes", "no"), task="boolq"))[0]
    assert (given, scored) == ("A passage.\nQuestion: is it?\nAnswer:", " yes")


def test_hellaswag_goes_on_from_its_question_and_winogrande_scores_what_follows_the_blank() -> None:
    assert choice_pairs(item(task="hellaswag", question="The cat ")) == [
        ("The cat", " a mat"), ("The cat", " on the dike"),
    ]  # fmt: skip
    assert choice_pairs(item(task="winogrande", question="It saw _ that day.", choices=("Al", "Bo"))) == [
        ("It saw Al", " that day."), ("It saw Bo", " that day."),
    ]  # fmt: skip
    with pytest.raises(InputError, match="winogrande item 1"):
        choice_pairs(item(task="winogrande", question="No blank here"))


def test_mmlu_lists_its_choices_and_scores_a_letter() -> None:
    pairs = choice_pairs(item(task="mmlu"))
    assert pairs == [("Where is the cat?\nA. a mat\nB. on the dike\nAnswer:", f" {letter}") for letter in "AB"]


def test_mmlu_has_no_more_choices_than_letters() -> None:
    with pytest.raises(InputError, match="27 choices; expected at most 26"):
        choice_pairs(item(task="mmlu", choices=tuple("abcdefghijklmnopqrstuvwxyz0")))


def test_acc_takes_the_sum_and_acc_norm_the_mean_per_character(
    model: Decoder, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    generator = torch.Generator().manual_seed(1)
    words = "the cat sat on mat a b Boxkämpfer jagen Viktor quer".split()

    def draw(count: int) -> str:
        return " ".join(words[int(torch.randint(len(words), (), generator=generator))] for _ in range(count))

    items = [item(question=draw(4), choices=(draw(1), draw(3), draw(6)), answer_index=n % 3) for n in range(20)]
    right = normed = 0
    assert tokenizer.bos_id is not None
    for one in items:
        prompt = [tokenizer.bos_id, *tokenizer.encode(f"Question: {one.question}\nAnswer:")]
        sums = [log_likelihood(model, prompt + tokenizer.encode(f" {c}"), len(prompt)) for c in one.choices]
        per_character = [value / len(c) for value, c in zip(sums, one.choices, strict=True)]
        right += sums.index(max(sums)) == one.answer_index
        normed += per_character.index(max(per_character)) == one.answer_index
    assert right != normed  # the two rules differ on these items, so that the test can tell them apart
    assert multiple_choice(scorer, items) == {"acc": right / 20, "acc_norm": normed / 20, "n": 20}


def test_no_items_are_refused(scorer: Scorer) -> None:
    with pytest.raises(InputError, match="no multiple-choice items"):
        multiple_choice(scorer, [])


def test_examples_of_the_same_subject_go_first_as_many_as_fit(scorer: Scorer, tokenizer: Tokenizer) -> None:
    seen: list[torch.Tensor] = []

    def recording(tokens: torch.Tensor, positions: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        seen.extend(row[: int((target >= 0).nonzero().min()) + 1] for row, target in zip(tokens, labels, strict=True))
        return torch.zeros(tokens.shape)

    task = item(task="mmlu", subject="cats", question="The cat")
    shots = [item(task="mmlu", subject="cats", question=f"Shot {n}", answer_index=0) for n in range(3)]
    other = item(task="mmlu", subject="dogs", question="Woof")
    spy = replace(scorer, token_nll=recording, context=1000)
    multiple_choice(spy, [task], few_shot=[other, *shots])
    solved = "".join(f"Shot {n}\nA. a mat\nB. on the dike\nAnswer: A\n\n" for n in range(3))
    assert tokenizer.decode(seen[0].tolist()) == f"{solved}The cat\nA. a mat\nB. on the dike\nAnswer:"

    room = len(seen[0]) - 1
    seen.clear()
    multiple_choice(replace(spy, context=room), [task], few_shot=[other, *shots])
    assert tokenizer.decode(seen[0].tolist()).startswith("Shot 1\n")


def test_examples_are_found_beside_the_tasks_file(tmp_path: Path) -> None:
    row = {"id": "x", "task": "mmlu", "question": "Q", "choices": ["a", "b"], "answer_index": 0, "subject": "cats"}
    (tmp_path / "mmlu_dev_fewshot.jsonl").write_text(json.dumps(row) + "\n")
    assert [found.subject for found in few_shot_items(tmp_path / "mmlu.jsonl.gz")] == ["cats"]
    assert few_shot_items(tmp_path / "arc_easy.jsonl") == []


def test_a_context_too_long_loses_its_beginning_but_not_bos(
    model: Decoder, tokenizer: Tokenizer, scorer: Scorer
) -> None:
    context, continuation = encode_pair(tokenizer, "The cat sat on the mat. " * 9, " quer")
    assert tokenizer.bos_id is not None
    ids = [tokenizer.bos_id, *context[-(12 - len(continuation)) :], *continuation]
    expected = log_likelihood(model, ids, len(ids) - len(continuation))
    found = score_pairs(replace(scorer, context=12), [("The cat sat on the mat. " * 9, " quer")])
    assert found == pytest.approx([expected], rel=1e-5)


def test_a_pair_is_cut_where_the_contexts_own_ids_end(tokenizer: Tokenizer) -> None:
    assert encode_pair(tokenizer, "The cat", " sat") == (tokenizer.encode("The cat"), tokenizer.encode(" sat"))
    given, scored = encode_pair(tokenizer, "The ", "cat")
    assert tokenizer.decode(given) == "The" and tokenizer.decode(scored) == " cat"
    given, scored = encode_pair(tokenizer, "The ca", "t")  # "cat" is one token: it cannot be given in part
    assert tokenizer.decode(given + scored) == "The cat" and scored
    assert encode_pair(tokenizer, "", "cat")[0] == []
