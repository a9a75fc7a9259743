"""Text of the running Python, and evaluation data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus_files import write_rows

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.sources import Document, read_documents
from data_pipeline.tasks import is_choice_task, read_choice_items, read_texts

ITEM = {"id": "q1", "context": "", "question": "Which?", "choices": ["a", "b"], "answer_index": 1, "subject": "art"}


def embedded(**fields: object) -> list[Document]:
    return list(read_documents(SourceConfig(name="python", **fields)))  # type: ignore[arg-type]


def test_the_standard_library_gives_megabytes_of_code_and_of_prose() -> None:
    code, prose = embedded(format="python_docs", subset="code"), embedded(format="python_docs", subset="prose")
    assert sum(len(d.text) for d in code) > 4e6 and sum(len(d.text) for d in prose) > 1e6
    assert len({d.id for d in code + prose}) == len(code) + len(prose)
    pages = {d.id: d.text for d in code + prose}
    assert "def dumps(" in pages["code/json"] and "Serialize ``obj``" in pages["prose/json"]
    assert len(embedded(format="python_docs")) == len(code) + len(prose)
    with pytest.raises(DataError, match="expected `code`, `prose`"):
        embedded(format="python_docs", subset="poems")


def test_questions_about_functions_are_answered_by_their_documentation() -> None:
    talks = {d.id: d.messages or [] for d in embedded(format="python_qa")}
    question, answer = talks["qa/json.dumps"]
    assert len(talks) > 2000 and (question["role"], answer["role"]) == ("user", "assistant")
    assert "json.dumps" in question["content"] and "Serialize ``obj``" in answer["content"]
    assert "qa/math.sqrt" in talks or "qa/math.gcd" in talks, "functions without Python source are asked about too"


def test_embedded_text_is_read_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from data_pipeline.config import SourceConfig as S; from data_pipeline.sources import *\n"
        "h = hashlib.sha256()\n"
        "for f in ('python_docs', 'python_qa'):\n"
        "    [h.update(d.text.encode()) for d in read_documents(S(name='p', format=f))]\n"
        "print(h.hexdigest())"
    )
    command = [sys.executable, "-c", code]
    one, two = (
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    )
    assert one == two and len(one) == 65


def test_importing_the_pipeline_loads_nothing_that_only_some_sources_need() -> None:
    code = (
        "import sys, data_pipeline.loader, data_pipeline.held_out, data_pipeline.tasks\n"
        "print([m for m in ('pyarrow', 'datasets', 'zstandard', 'transformers', 'pandas') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_tasks_are_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "eval").mkdir()
    file = write_rows(tmp_path / "eval" / "letters.jsonl", [ITEM, {**ITEM, "id": "q2"}])
    items = read_choice_items("letters", tmp_path)
    assert items == read_choice_items(file) and [item.id for item in items] == ["q1", "q2"]
    assert (items[0].choices, items[0].answer_index, items[0].subject) == (("a", "b"), 1, "art")
    monkeypatch.setenv("POCKETFORGE_DATA", str(tmp_path))
    assert read_choice_items("letters") == items and is_choice_task("letters")
    with pytest.raises(DataError, match="names in .*letters"):
        read_choice_items("unknown")


@pytest.mark.parametrize(
    "change", [{"choices": ["a"]}, {"choices": "ab"}, {"answer_index": 2}, {"answer_index": "1"}, {"question": ""}]
)
def test_a_wrong_item_is_named_by_file_and_row(tmp_path: Path, change: dict) -> None:
    file = write_rows(tmp_path / "t.jsonl", [ITEM, {**ITEM, **change}])
    with pytest.raises(DataError, match=r"t\.jsonl: row 2"):
        read_choice_items(file)


def test_a_row_nested_thousands_deep_is_named(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text(json.dumps(ITEM) + "\n" + "[" * 20_000 + "\n")
    with pytest.raises(DataError, match=r"deep\.jsonl: line 2 is not JSON"):
        read_choice_items(tmp_path / "deep.jsonl")


def test_texts_are_one_a_plain_file_and_one_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "a.txt") == ["one\n\ntwo\n"] and not is_choice_task(tmp_path / "a.txt")
    assert read_texts(write_rows(tmp_path / "a.jsonl", [{"text": "x\u2028y"}, {"text": " "}])) == ["x\u2028y"]
    with pytest.raises(DataError, match="no text under `text`"):
        read_texts(write_rows(tmp_path / "b.jsonl", [{"body": "x"}]))
    with pytest.raises(DataError, match="no rows"):
        read_texts(write_rows(tmp_path / "c.jsonl", []))


def test_every_shared_multiple_choice_set_is_read_whole(shared_data: Path) -> None:
    expected = {"arc_easy": 1473, "boolq": 1824, "hellaswag": 500, "winogrande": 633, "mmlu_dev_fewshot": 285}
    assert {name: len(read_choice_items(name, shared_data)) for name in expected} == expected
    assert len(read_texts("wikitext2_valid", shared_data)) == 60
