"""Score a model: perplexity (word_perplexity, bits_per_byte) on text, acc and acc_norm on multiple choice.

M is a run directory, a checkpoint, a Hugging Face folder or a packed file. A task is a name (arc_easy, wikitext2 ...),
read from --data-dir, or a path to a text file or JSON Lines.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from launch.models import add_runtime_options, load_scorer  # noqa: E402
from launch.rundir import check_output  # noqa: E402
from launch.tasks import Task  # noqa: E402
from stages.errors import InputError, RunError  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from stages.scoring import Scorer, TokenScores


def main() -> None:
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("--model", metavar="M", type=Path, required=True)
    parser.add_argument("--tasks", metavar="T1,T2", required=True)
    parser.add_argument("--limit", type=int, metavar="N", help="items (or documents) a task")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="default: $POCKETFORGE_DATA, else data/")
    parser.add_argument("--output", type=Path, metavar="F.json", required=True)
    add_runtime_options(parser)
    options, _ = parser.parse()
    if options.limit is not None and options.limit < 1:
        raise InputError(f"--limit {options.limit}; expected at least 1, or leave it out to score all")
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise InputError(f"--tasks {options.tasks!r} names no task; give names or paths, with commas between")
    check_output(options.output)
    from launch.tasks import resolve_tasks

    tasks = resolve_tasks(names, folder=options.data_dir)
    evaluate(load_scorer(options.model, options), tasks, options.limit, options.output)


def evaluate(loaded: Scorer, tasks: list[Task], limit: int | None, output: Path) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from launch.rundir import write_json
    from launch.tasks import score_task

    loaded = dataclasses.replace(loaded, token_nll=partial(_finite, loaded.token_nll))
    bar = track(tasks, description="scoring", console=Console(stderr=True), disable=not sys.stderr.isatty())
    results = {task.key: score_task(loaded, task, limit=limit) for task in bar}
    write_json(output, results)
    table = Table("task", "metric", "value", "n")
    for key, scores in results.items():
        for metric, value in scores.items():
            if metric != "n":
                table.add_row(key, metric, f"{value:.4f}", str(scores["n"]))
    Console().print(table)


def _finite(token_nll: TokenScores, tokens: Tensor, positions: Tensor | None, labels: Tensor) -> Tensor:
    """Scores that are numbers: the likeliest of some that are none is no answer."""
    found = token_nll(tokens, positions, labels)
    if not bool(found.isfinite().all()):
        raise RunError("the model's log-likelihoods are not finite; its weights are damaged, make or export it again")
    return found


if __name__ == "__main__":
    run(main)
