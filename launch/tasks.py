"""Task names and files, to scores: shared by `launch/evaluate.py` and the end of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import DataError
from data_pipeline.tasks import find_task_file, is_choice_task, read_choice_items, read_texts

if TYPE_CHECKING:
    from stages.loading import LoadedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    key: str
    """What its result is called: the name, or the file's stem."""
    path: Path
    is_choice: bool


def resolve_tasks(names: Sequence[str], *, folder: Path | None = None, required: bool = True) -> list[Task]:
    """Find each task by name or path. A missing one is refused where `required`, else left out with a warning."""
    found: list[Task] = []
    for name in names:
        try:
            path = find_task_file(name, folder)
        except DataError as error:
            if required:
                raise
            logger.warning("%s; left out", error)
            continue
        found.append(Task(path.name.partition(".")[0], path, is_choice_task(path)))
    return found


def score_task(loaded: LoadedModel, task: Task, *, limit: int | None) -> dict[str, float]:
    """`{metric: value, "n": count}` of DESIGN's evaluation.json."""
    from stages.evaluate import few_shot_items, multiple_choice, perplexity

    if task.is_choice:
        items = read_choice_items(task.path)[:limit]
        return multiple_choice(loaded, items, few_shot=few_shot_items(task.path))
    return perplexity(loaded, read_texts(task.path)[:limit])
