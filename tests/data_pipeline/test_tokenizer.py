"""Training and loading tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.tokenizer import BOS, EOS, Tokenizer

TEXTS = ["the model runs", "naïve\u2028line \u0085 7 \t\n\n", "<|eot_id|> is text", "日本語 🙂 \x00", "", " a  b   c "]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids, default=0) < tokenizer.vocab_size
    assert tokenizer.encode_batch([text, "x"])[0] == ids


def test_special_tokens_are_found_and_put_around_documents(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_id(BOS) == tokenizer.bos_id and tokenizer.token_id(EOS) == tokenizer.eos_id
    assert tokenizer.document([9]) == [tokenizer.bos_id, 9, tokenizer.eos_id]
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.pad_id, None}) == 5


def test_the_vocabulary_has_the_size_asked_for_even_when_the_text_is_short() -> None:
    assert Tokenizer.train(["abc"], 400).vocab_size == 400
    with pytest.raises(DataError, match="at least 262"):
        Tokenizer.train(["abc"], 200)


def test_a_saved_tokenizer_loads_equal_from_file_folder_and_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for loaded in (
        Tokenizer.from_file(tmp_path),
        Tokenizer.from_file(tmp_path / "tokenizer.json"),
        Tokenizer.from_json(tokenizer.to_json()),
    ):
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        Tokenizer.from_file(tmp_path / "other.json")


def test_unusual_names_of_special_tokens_come_from_the_folders_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = tokenizer.to_json().replace(BOS, "<START>").replace(EOS, "<STOP>")
    (tmp_path / "tokenizer.json").write_text(text)
    assert Tokenizer.from_file(tmp_path).bos_id is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<START>", "eos_token": {"content": "<STOP>"}})
    )
    loaded = Tokenizer.from_file(tmp_path)
    assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_published_tokenizers_load(shared_data: Path) -> None:
    dolma = Tokenizer.from_file(shared_data / "tokenizers" / "dolma2.json")
    neox = Tokenizer.from_file(shared_data / "tokenizers" / "gpt_neox_20b_pii_special.json")
    assert (dolma.eos_id, dolma.eot_id, dolma.pad_id, dolma.bos_id) == (100257, 100265, 100277, None)
    assert (neox.eos_id, neox.eot_id, neox.pad_id, neox.vocab_size <= 65_536) == (0, None, 1, True)
    for text in TEXTS:
        assert dolma.decode(dolma.encode(text)) == text
