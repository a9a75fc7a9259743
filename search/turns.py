"""A machine that is measured and computes as well does both by turns: times beside a training are a fifth too long.

Locks of two files, which the kernel releases with the process that held them, however it ended. Whoever computes holds
`turn` with others; whoever measures holds it alone. `gate` keeps a measurement from waiting for ever: it is taken first, so
that those who compute stop at the next point where they can (`give`), a training at its next step.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from search.devices.base import Measurement, MeasureRequest
from search.devices.driver import ProgramDevice


class Turns:
    """One of those who take turns; others, in this process or another, have objects of their own for the same folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._gate, self._turn = folder / ".gate.lock", folder / ".turn.lock"
        self._held: tuple[IO[str], IO[str]] | None = None

    @contextmanager
    def computing(self) -> Iterator[None]:
        """With others that compute; not while something is measured."""
        with self._gate.open("a") as gate, self._turn.open("a") as turn:
            self._held = gate, turn
            self._enter()
            try:
                yield
            finally:
                self._held = None

    def give(self) -> None:
        """While computing: let those measure who wait for it."""
        if self._held is not None:
            fcntl.flock(self._held[1], fcntl.LOCK_UN)
            self._enter()

    def _enter(self) -> None:
        assert self._held is not None
        gate, turn = self._held
        fcntl.flock(gate, fcntl.LOCK_EX)
        try:
            fcntl.flock(turn, fcntl.LOCK_SH)
        finally:
            fcntl.flock(gate, fcntl.LOCK_UN)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Alone."""
        with self._gate.open("a") as gate, self._turn.open("a") as turn:
            fcntl.flock(gate, fcntl.LOCK_EX)
            fcntl.flock(turn, fcntl.LOCK_EX)
            yield


@dataclass(frozen=True)
class MachineInTurn(ProgramDevice):
    """This machine, measured while nothing else of the search computes on it."""

    turns: Turns

    def measure(self, request: MeasureRequest) -> Measurement:
        with self.turns.measuring():
            return super().measure(request)
