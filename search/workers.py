"""Scores candidates in a process of their own: one that dies takes nothing with it, and there is no pickle between them.

    python -m search.workers MODULE:FUNCTION

reads one JSON object a line, a candidate, and prints one, its scores.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

Score = Callable[[Mapping[str, Any]], Mapping[str, float]]
ROOT = str(Path(__file__).resolve().parent.parent)
"""For workers that are started in another folder."""


class WorkerLost(RuntimeError):
    """The process that scored a candidate ended: another one can be asked."""


class Infeasible(ValueError):
    """The candidate cannot be scored, here or anywhere: training diverged, memory did not suffice."""


class ProcessScorer:
    """A scoring function behind one process, which is started when it is first needed and again when it has died."""

    def __init__(self, function: str, timeout_s: float | None = None, log: Path | None = None) -> None:
        """`function` is MODULE:FUNCTION, a `Score` that can be imported. What the process says goes to the end of `log`, by
        default to this process's standard error."""
        self.function, self.timeout_s, self.log = function, timeout_s, log
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, float]:
        """Raises WorkerLost, Infeasible."""
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        limit = threading.Timer(self.timeout_s, process.kill) if self.timeout_s is not None else None
        if limit is not None:
            limit.start()
        try:
            process.stdin.write(json.dumps(dict(config)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        finally:
            if limit is not None:
                limit.cancel()
        if not line.endswith("\n"):
            self.close()
            told = f"; {self.log} has what it said" if self.log is not None else ""
            raise WorkerLost(f"the worker of {self.function} ended with status {process.returncode} before its answer{told}")
        answer = json.loads(line)
        if "infeasible" in answer:
            raise Infeasible(answer["infeasible"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["scores"]

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "search.workers", self.function]
        with nullcontext() if self.log is None else self.log.open("a", encoding="utf-8") as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                    env={**os.environ, "PYTHONPATH": path})  # fmt: skip

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    try:
                        stream.close()
                    except BrokenPipeError:
                        continue  # what it was to read died with it
            self._process = None


def checked(scores: Mapping[str, float]) -> dict[str, float]:
    """As finite numbers. Raises Infeasible: a diverged training has no score, and none is made up for it."""
    bad = [name for name, value in scores.items() if not math.isfinite(value)]
    if bad:
        raise Infeasible(f"{bad[0]} is {scores[bad[0]]}: training diverged")
    return {name: float(value) for name, value in scores.items()}


def answer(score: Score, config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {"scores": checked(score(config))}
    except ValueError as error:
        return {"infeasible": str(error)}
    except Exception as error:  # told to the service, which counts it as an attempt
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def _read(stream: TextIO, lines: queue.Queue[str]) -> None:
    """Ends the process with its service, even in the middle of a training."""
    for line in stream:
        lines.put(line)
    os._exit(0)


def main(function: str) -> None:
    module, _, name = function.partition(":")
    score: Score = getattr(importlib.import_module(module), name)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin, lines), daemon=True).start()
    out, sys.stdout = sys.stdout, sys.stderr  # what a training prints is no answer
    while True:
        out.write(json.dumps(answer(score, json.loads(lines.get()))) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
