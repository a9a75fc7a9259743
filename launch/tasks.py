"""Task names and files, to scores: shared by `launch/evaluate.py` and the end of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import DataError
from data_pipeline.tasks import find_task_file, is_choice_task, read_choice_items, read_texts
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.scoring import Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    key: str
    """What its result is called: the name, or the file's stem."""
    path: Path
    is_choice: bool


def resolve_tasks(names: Sequence[str], *, folder: Path | None = None, required: bool = True) -> list[Task]:
    """Find each task by name or path. A missing one is refused where `required`, else left out with a warning."""
    if clash := find_clash(names):
        raise InputError(clash)
    found: list[Task] = []
    for name in names:
        try:
            path = find_task_file(name, folder)
        except DataError as error:
            if required:
                raise
            logger.warning("%s; left out", error)
            continue
        found.append(Task(task_key(str(path)), path, is_choice_task(path)))
    return found


def task_key(name: str) -> str:
    """What a task's result is called: the name, or the file's stem."""
    return Path(name).name.partition(".")[0]


def find_clash(names: Sequence[str]) -> str | None:
    """What is wrong where two tasks would go by one name: the later result would replace the earlier."""
    seen: dict[str, str] = {}
    for name in names:
        key = task_key(name)
        if key in seen:
            return f"tasks {seen[key]} and {name} would both be called {key!r}; rename a file, or score them apart"
        seen[key] = name
    return None


def score_task(loaded: Scorer, task: Task, *, limit: int | None) -> dict[str, float]:
    """`{metric: value, "n": count}` of DESIGN's evaluation.json."""
    from stages.evaluate import few_shot_items, multiple_choice, perplexity

    if task.is_choice:
        items = read_choice_items(task.path)[:limit]
        return multiple_choice(loaded, items, few_shot=few_shot_items(task.path))
    return perplexity(loaded, read_texts(task.path)[:limit])
