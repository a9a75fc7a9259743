"""What a run says about itself: `metrics.jsonl`, and the same numbers for Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import threading
import time
from pathlib import Path
from typing import Any

import torch

from stages.wandb_file import held_steps

logger = logging.getLogger(__name__)
WRITTEN_S = 5.0

# Dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets; the longer name comes first.
PEAKS = (("B200", 2250e12), ("H200", 989e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("L40S", 362e12),
         ("A100", 312e12), ("L4", 121e12))  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s at this precision, or None where we do not know it."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS if part in name), None)


class MetricsFile:
    """JSON Lines, one object a logged step; no step stands twice."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        """Keep only lines up to `resumed_step`: what follows will be computed, and logged, again."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step_of(line) <= resumed_step]
            beside = path.with_name(f".{path.name}.part")
            beside.write_bytes(b"".join(kept))
            beside.replace(path)

    def write(self, row: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")


def lost_steps(path: Path, last: int, log_every: int) -> list[int]:
    """Steps up to `last` that were due to be logged and are covered by no line.

    A line says how many steps it covers (`window_steps`), so another `log_every` in an earlier start is not a hole. A
    line without that number, of an older version, is taken to reach back to the line before it.
    """
    covered: set[int] = set()
    before = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        if (step := _step_of(line)) <= last:
            width = json.loads(line).get("window_steps")
            first = step - width + 1 if isinstance(width, int) else before + 1
            covered.update(range(max(1, int(first)), int(step) + 1))
            before = int(step)
    due = dict.fromkeys((1, *range(log_every, last + 1, log_every)))
    return [step for step in due if step <= last and step not in covered]


def warn_of_lost_steps(path: Path, last: int, log_every: int) -> None:
    """One line that says which logged steps are no longer there."""
    lost = lost_steps(path, last, log_every)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        logger.warning("%s is damaged or cut: no line covers step %s%s; the run goes on, its curves have a hole", path,
                       ", ".join(map(str, lost[:5])), more)  # fmt: skip


def _step_of(line: bytes) -> float:
    """The line's step; infinite for a line that a kill cut short, or that is none of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) and step >= 1 else math.inf


class WandbLog:
    """An offline (or online) W&B run, of a stage or of a search, written by a thread of its own.

    Importing and starting wandb takes over a second, and it may fail in many ways; neither may hold up or end a run. A step
    that the files of an earlier start hold is not logged again.
    """

    def __init__(
        self, folder: Path, *, mode: str, group: str, name: str, config: dict[str, Any], project: str = "pocketforge",
        axes: dict[str, str] | None = None, elsewhere: str = "metrics.jsonl",
    ) -> None:  # fmt: skip
        """`mode` is wandb's: offline, online or disabled. Files go to `folder`/wandb. `axes`: pattern of names -> what they
        are plotted against in place of the step. `elsewhere`: what else has all numbers, for a warning."""
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._settings: dict[str, Any] = {
            "mode": mode, "group": group, "name": name, "config": config, "dir": str(folder), "project": project,
            "id": _run_id(folder), "resume": "allow",
        }  # fmt: skip
        self._axes, self._elsewhere = axes or {}, elsewhere
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        if mode != "disabled":
            self._thread.start()

    def write(self, row: dict[str, Any]) -> None:
        """`step` says which; steps must rise. A value that is a function is given the module wandb and makes what is logged,
        such as a table, in the thread."""
        self._rows.put(row)

    def close(self, timeout_seconds: float = 30.0) -> None:
        """Hand over what is left; a W&B that hangs is left behind."""
        self._rows.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                logger.warning("wandb did not finish within %.0f s; %s has all numbers", timeout_seconds, self._elsewhere)

    def _run(self) -> None:
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            folder = Path(self._settings["dir"])
            folder.mkdir(parents=True, exist_ok=True)
            held = held_steps(folder, self._settings["id"])
            _wait_for_a_new_second(folder)
            quiet = wandb.Settings(console="off", x_disable_stats=True, init_timeout=60)
            run = wandb.init(**self._settings, settings=quiet, reinit="create_new")
            for names, axis in self._axes.items():
                run.define_metric(names, step_metric=axis)
            step = 0
            while (row := self._rows.get()) is not None:
                if (step := int(row["step"])) not in held:
                    values = {key: value(wandb) if callable(value) else value for key, value in row.items() if key != "stage"}
                    run.log(values, step=step, commit=True)
            run.finish()
            self._wait_written(folder, step)
        except Exception as error:
            logger.warning("wandb failed (%s: %s); the run goes on, %s has all numbers", type(error).__name__,
                           str(error).splitlines()[0] if str(error) else "", self._elsewhere)  # fmt: skip


    def _wait_written(self, folder: Path, step: int) -> None:
        """`finish` returns before the file is whole (about once in a hundred on a busy machine); whoever starts again at once
        would read that steps are missing, and log them twice."""
        until = time.monotonic() + WRITTEN_S
        while step and step not in held_steps(folder, self._settings["id"]) and time.monotonic() < until:
            time.sleep(0.02)


def _wait_for_a_new_second(folder: Path) -> None:
    """W&B names a start's folder by the second: a second start within it would write into the file of the first."""
    until = time.monotonic() + 2.0
    while list(folder.glob(f"wandb/*run-{time.strftime('%Y%m%d_%H%M%S')}-*")) and time.monotonic() < until:
        time.sleep(0.02)


def _run_id(folder: Path) -> str:
    """The same for every resumption of one stage in one run directory."""
    import hashlib

    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
