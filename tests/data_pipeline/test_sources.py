"""Reading documents: every format, the held-out side, limits, and damage."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from corpus_files import write_rows

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.held_out import held_out_chats, held_out_texts
from data_pipeline.sources import choose, read_documents

ROWS = [{"id": str(i), "text": f"row {i} \u2028 and \u0085 stay " + "x" * i} for i in range(50)]
Make = Callable[..., SourceConfig]


def texts(path: Path | str, **fields: object) -> list[str]:
    return [d.text for d in read_documents(SourceConfig(name="s", path=str(path), **fields))]  # type: ignore[arg-type]


def lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_plain_gzip_zstandard_and_parquet_files_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    data = lines()
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(compress(data[:1000]) + compress(data[1000:]))  # two frames, cut in a line
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert texts(tmp_path / name) == [row["text"] for row in ROWS], name


def test_folders_and_globs_are_read_in_order_and_variables_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "LICENSE").write_text("not data")
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    assert texts(tmp_path) == texts("$SOME_DATA/*.jsonl") == ["a", "b"]
    monkeypatch.delenv("SOME_DATA")
    with pytest.raises(DataError, match="variable that is not set"):
        texts("$SOME_DATA/*.jsonl")


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "\n\n".join(f"paragraph {i} " + "word " * 100 for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    pieces = texts(tmp_path / "book.txt")
    assert len(pieces) > 3 and "\n\n".join(pieces) == text


def test_templates_and_multiple_choice_rows_become_text(tmp_path: Path) -> None:
    choice = {"id": "1", "context": "Ice.", "question": "Cold?", "choices": ["no", "yes"], "answer_index": 1}
    file = write_rows(tmp_path / "a.jsonl", [choice])
    assert texts(file) == ["Ice.\nQuestion: Cold?\nAnswer: yes"]
    assert texts(file, template="{question}\n{id}") == ["Cold?\n1"]
    with pytest.raises(DataError, match=r"row 1.*'solution'.*context, question"):
        texts(file, template="{solution}")
    with pytest.raises(DataError, match="set text_field or template"):
        texts(write_rows(tmp_path / "b.jsonl", [{"body": "x"}]))


def test_chats_keep_their_messages_and_show_their_tools(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows: list[dict[str, Any]] = [{"messages": talk, "tools": "[]"}, {"messages": talk, "tools": [{"n": 1}]}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    plain, tools = read_documents(SourceConfig(name="s", path=str(file)))
    assert plain.messages == talk and plain.text == "q\n\na"
    assert tools.messages is not None and tools.messages[1:] == talk and '[{"n": 1}]' in tools.messages[0]["content"]


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5])
def test_training_and_held_out_parts_share_nothing_and_lose_nothing(text_source: Make, fraction: float) -> None:
    source = text_source("s", count=60)
    whole = {d.id for d in read_documents(source)}
    train = {d.id for d in read_documents(source, part="train", held_out_fraction=fraction)}
    if fraction == 0.0:
        assert train == whole
        return
    held = {d.id for d in read_documents(source, part="held_out", held_out_fraction=fraction)}
    assert held and train and not held & train and held | train == whole
    assert abs(len(held) / 60 - fraction) < 0.2


def test_a_document_is_on_the_same_side_in_every_source_and_order(tmp_path: Path) -> None:
    held = []
    for name, rows in (("a", ROWS), ("b", ROWS[::-1])):
        source = SourceConfig(name=name, path=str(write_rows(tmp_path / f"{name}.jsonl", rows)))
        held.append({d.text for d in read_documents(source, part="held_out", held_out_fraction=0.2)})
    assert held[0] == held[1]


def test_a_source_of_one_document_trains_and_has_nothing_to_hold_out(tmp_path: Path) -> None:
    source = SourceConfig(name="s", path=str(write_rows(tmp_path / "a.jsonl", ROWS[:1])))
    assert len(list(read_documents(source, part="train"))) == 1
    with pytest.raises(DataError, match="no held-out documents"):
        held_out_texts([source], 4, 0.01)


def test_answers_to_one_question_are_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{i % 20}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(60)
    ]
    source = SourceConfig(name="s", path=str(write_rows(tmp_path / "a.jsonl", rows)))
    held = {talk[0]["content"] for talk in held_out_chats([source], 100, 0.3)}
    documents = read_documents(source, part="train", held_out_fraction=0.3)
    train = {d.messages[0]["content"] for d in documents if d.messages}
    assert held and train and not held & train


def test_a_held_out_set_takes_from_every_source_and_grows_by_adding(text_source: Make) -> None:
    sources = [text_source("a", count=30), text_source("b", count=30)]
    small, large = held_out_texts(sources, 4, 0.3), held_out_texts(sources, 8, 0.3)
    assert len(small) == 4 and large[:4] == small and {text[0] for text in small} == {"a", "b"}


def test_a_limit_of_bytes_takes_a_seeded_choice_in_order(text_source: Make) -> None:
    source = text_source("s", count=60)
    everything = list(read_documents(source))
    one, again, other = (choose(everything, 3000, seed) for seed in (0, 0, 1))
    assert one == again != other
    for chosen in (one, other):
        size = sum(len(d.text.encode()) for d in chosen)
        assert 2000 < size <= 3000 and [d for d in everything if d in chosen] == chosen
    assert len(choose(everything[:1], 10, 0)[0].text.encode()) <= 10


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1"),
        ("a.jsonl.gz", gzip.compress(lines())[:-20], "cut short"),
        ("a.jsonl.gz", lines(), "damaged"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(lines())[:-20], "cut short"),
        ("a.jsonl.zst", b"not zstandard at all", "damaged"),
        ("a.parquet", b"PAR1 nothing", "Parquet"),
        ("a.txt", b"", "no text"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.xyz", b"abc", "unknown ending"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        texts(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing.jsonl"):
        texts(tmp_path / "nothing.jsonl")


def test_a_data_set_in_the_hub_form_is_streamed_and_an_unreadable_one_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_rows(tmp_path / "train.jsonl", ROWS)
    source = SourceConfig(name="s", path=str(tmp_path), format="hf", max_bytes=500)
    found = [d.text for d in read_documents(source)]
    assert found == [row["text"] for row in ROWS][: len(found)] and 400 < len("".join(found).encode()) <= 500
    with pytest.raises(DataError, match="cannot stream"):
        list(read_documents(SourceConfig(name="s", path=str(tmp_path / "none"), format="hf")))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70])
def test_any_seed_chooses(text_source: Make, seed: int) -> None:
    assert list(read_documents(text_source("s", max_bytes=400), seed=seed))
