"""Task names and files, to scores: shared by `launch/evaluate.py` and the end of a recipe."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stages.errors import InputError

if TYPE_CHECKING:
    from stages.loading import LoadedModel

logger = logging.getLogger(__name__)

TASKS: dict[str, tuple[str, Literal["choice", "text"]]] = {
    **{name: (f"eval/{name}", "choice") for name in (
        "arc_easy", "arc_challenge", "boolq", "piqa", "siqa", "hellaswag", "openbookqa", "winogrande",
        "commonsense_qa", "mmlu", "aqua_rat",
    )},
    "wikitext2": ("pretrain/wikitext2_valid", "text"),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    key: str
    """What its result is called: the name, or the file's stem."""
    path: Path
    kind: Literal["choice", "text"]


def data_dir(given: Path | None = None) -> Path:
    return given or Path(os.environ.get("POCKETFORGE_DATA") or "data")


def resolve_tasks(names: Sequence[str], *, folder: Path | None = None, required: bool = True) -> list[Task]:
    """Find each task. A missing named one is refused where `required`, else left out with a warning."""
    found: list[Task] = []
    for name in names:
        if name in TASKS:
            stem, kind = TASKS[name]
            candidates = [data_dir(folder) / f"{stem}{ending}" for ending in (".jsonl", ".jsonl.gz", ".txt")]
            path = next((candidate for candidate in candidates if candidate.is_file()), None)
            if path is not None:
                found.append(Task(name, path, kind))
            elif required:
                raise InputError(f"task {name} is not in {data_dir(folder)} (looked for {candidates[0].name}); "
                                 "point --data-dir or POCKETFORGE_DATA at a folder that has it")
            else:
                logger.warning("task %s is not in %s and is left out", name, data_dir(folder))
        elif Path(name).is_file():
            found.append(Task(_stem(Path(name)), Path(name), _kind(Path(name))))
        else:
            raise InputError(f"task {name!r} is neither a name ({', '.join(TASKS)}) nor a file")
    return found


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]


def _kind(path: Path) -> Literal["choice", "text"]:
    """A JSON Lines file whose rows have `choices` is multiple choice; all else is text."""
    if ".jsonl" not in path.suffixes:
        return "text"
    from data_pipeline.tasks import first_row

    return "choice" if "choices" in first_row(path) else "text"


def score_task(loaded: LoadedModel, task: Task, *, limit: int | None) -> dict[str, float]:
    """`{metric: value, "n": count}` of DESIGN's evaluation.json."""
    from data_pipeline.tasks import read_choice_items, read_texts
    from stages.evaluate import multiple_choice, perplexity

    if task.kind == "text":
        return perplexity(loaded, read_texts(task.path)[:limit])
    return multiple_choice(loaded, read_choice_items(task.path)[:limit])
