"""Evaluation data: multiple choice, texts and conversations, read and checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import files
from data_pipeline.errors import DataError

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".txt.gz", ".md")


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice item; `choices[answer_index]` is right."""

    id: str
    context: str
    question: str
    choices: tuple[str, ...]
    answer_index: int
    subject: str = ""
    task: str = ""


def data_directory(data_dir: str | Path | None = None) -> Path:
    """Where named tasks are looked for: the given folder, else `POCKETFORGE_DATA`, else `data/`."""
    return Path(data_dir or os.environ.get("POCKETFORGE_DATA") or "data")


def find_task_file(task: str | Path, data_dir: str | Path | None = None) -> Path:
    """The file of a task: a path as it is, a name by the file's stem in the folder (its `eval/` first)."""
    direct = Path(task).expanduser()
    if direct.is_file():
        return direct
    root = data_directory(data_dir)
    if os.sep not in str(task):
        for folder in (root / "eval", root, *sorted(path for path in root.glob("*") if path.is_dir())):
            for ending in _ENDINGS:
                if (folder / f"{task}{ending}").is_file():
                    return folder / f"{task}{ending}"
    known = sorted({file.name.split(".")[0] for file in (root / "eval").glob("*.*")}) if root.is_dir() else []
    where = f"names in {root}: {', '.join(known)}" if known else f"no folder of tasks at {root}"
    raise DataError(f"task {task}: neither a file nor a known name ({where}); give a path, or set --data-dir")


def choice_item(row: dict[str, Any], where: str) -> ChoiceItem:
    """Check one row of the multiple-choice schema."""
    choices, answer, question = row.get("choices"), row.get("answer_index"), row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: no text under `question`; expected the multiple-choice schema")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: `choices` must be a list of at least two texts")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer_index={answer!r}; expected a whole number from 0 to {len(choices) - 1}")
    return ChoiceItem(
        id=str(row.get("id", where)),
        context=str(row.get("context") or ""),
        question=question,
        choices=tuple(choices),
        answer_index=answer,
        subject=str(row.get("subject") or ""),
        task=str(row.get("task") or ""),
    )


def choice_text(item: ChoiceItem) -> str:
    """A training text from an item: context, question and right answer."""
    context = f"{item.context}\n" if item.context else ""
    return f"{context}Question: {item.question}\nAnswer: {item.choices[item.answer_index].strip()}"


def read_choice_items(task: str | Path, data_dir: str | Path | None = None) -> list[ChoiceItem]:
    """Items of a task by name or path. DataError names file and row of the first that is wrong."""
    return [choice_item(row, where) for row, where in _rows(find_task_file(task, data_dir))]


def is_choice_task(task: str | Path, data_dir: str | Path | None = None) -> bool:
    """Whether the task's file holds multiple choice (else it is text)."""
    file = find_task_file(task, data_dir)
    if files.kind_of(file) == "text":
        return False
    return "choices" in next(files.read_rows(file, files.kind_of(file)))


def read_texts(task: str | Path, data_dir: str | Path | None = None) -> list[str]:
    """Documents of a text corpus: a plain-text file is one, JSON Lines and Parquet hold one a row under `text`."""
    file = find_task_file(task, data_dir)
    if files.kind_of(file) == "text":
        return [files.read_text(file)]
    texts = []
    for row, where in _rows(file):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{where}: no text under `text`; the row has {', '.join(map(str, row))}")
        if row["text"].strip():
            texts.append(files.valid_text(row["text"]))
    if not texts:
        raise DataError(f"{file}: no text; expected at least one document that is not empty")
    return texts


def _rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    for number, row in enumerate(files.read_rows(file, files.kind_of(file)), 1):
        yield row, f"{file}: row {number}"
