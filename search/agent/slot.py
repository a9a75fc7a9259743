"""The one measurement that an agent has under way, and the answers of the last ones.

A search whose connection broke asks again for the same job and fence: it gets the answer, or waits for it, and nothing is
measured twice.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from search.agent.answer import Answer
from search.agent.measuring import Task, measure
from search.devices.base import Device
from search.devices.driver import STOP

KEPT_ANSWERS = 64
log = logging.getLogger(__name__)


class _Running:
    def __init__(self, job: str, fence: int) -> None:
        self.job, self.fence = job, fence
        self.stop, self.done = threading.Event(), threading.Event()
        self.answer: Answer | None = None


class Slot:
    """Thread-safe."""

    def __init__(self, device: Device, measure: Callable[[Device, Task], Answer] = measure) -> None:
        self.device, self._measure = device, measure
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._kept: OrderedDict[tuple[str, int], Answer] = OrderedDict()

    def run(self, job: str, fence: int, task: Task) -> Answer | str:
        """The answer, or the name of the other job that is under way. Blocks while it measures."""
        with self._lock:
            if (kept := self._kept.get((job, fence))) is not None:
                return kept
            running = self._running
            if running is not None and (running.job, running.fence) != (job, fence):
                return running.job
            mine = running is None
            if running is None:
                running = self._running = _Running(job, fence)
        if mine:
            self._measure_one(running, task)
        running.done.wait()
        assert running.answer is not None
        return running.answer

    def _measure_one(self, running: _Running, task: Task) -> None:
        before = STOP.set(running.stop)
        said: dict[str, Any] = {"device": self.device.name, "fidelity": self.device.fidelity}
        answer = Answer(status="lost", reason="the agent failed", **said)
        try:
            answer = self._measure(self.device, task)
        except Exception as error:
            log.exception("job %s", running.job)
            answer = Answer(status="lost", reason=f"the agent failed: {error!r}"[:500], **said)
        finally:
            STOP.reset(before)
            with self._lock:
                running.answer, self._running = answer, None
                if not running.stop.is_set():
                    self._kept[running.job, running.fence] = answer
                while len(self._kept) > KEPT_ANSWERS:
                    self._kept.popitem(last=False)
            running.done.set()

    def state(self, job: str) -> str:
        """running, done or unknown; of no job ("") busy or idle."""
        with self._lock:
            if not job:
                return "idle" if self._running is None else "busy"
            if self._running is not None and self._running.job == job:
                return "running"
            return "done" if any(kept == job for kept, _ in self._kept) else "unknown"

    def cancel(self, job: str) -> bool:
        with self._lock:
            if self._running is None or self._running.job != job:
                return False
            self._running.stop.set()
            return True
