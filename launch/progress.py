"""Progress bars with ETA on a terminal, fed by the stages' own `metrics.jsonl`: the same under every runner."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def follow_progress(directory: Path, steps: Mapping[str, int], *, enabled: bool = True) -> Iterator[None]:
    """Show a bar a stage while the block runs. Quiet where standard error is not a terminal."""
    if not (enabled and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    stop = threading.Event()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tails = {stage: _Tail(directory / stage / "metrics.jsonl") for stage in steps}
        tasks = {stage: progress.add_task(stage, total=total, note="waiting", start=False)
                 for stage, total in steps.items()}

        def update() -> None:
            for stage, tail in tails.items():
                row = tail.last()
                if row is not None:
                    progress.start_task(tasks[stage])
                    note = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s"
                    progress.update(tasks[stage], completed=row["step"], note=note)

        def follow() -> None:
            while not stop.wait(0.5):
                update()

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            update()


class _Tail:
    """The newest whole line of a growing JSON Lines file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def last(self) -> dict[str, float] | None:
        if not self.path.exists():
            return None
        with self.path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().split(b"\n")[:-1]
        try:
            row = json.loads(lines[-1])
            return {key: float(row[key]) for key in ("step", "loss", "tokens_per_second")}
        except (IndexError, ValueError, TypeError, KeyError, RecursionError):
            return None  # no line yet, or a damaged one: the next is shown
