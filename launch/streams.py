"""Standard output and error that may be closed or full, as any command may find them."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from stages.errors import RunError


class OutputError(RunError):
    """Standard output cannot be written."""


class _Output(io.RawIOBase):
    """File descriptor 1, whose first failure is an OutputError and which then takes everything and drops it.

    Dropping matters: the interpreter flushes once more at its end, and would end with a status of its own.
    """

    def __init__(self, *, closed: bool) -> None:
        self._shut = closed
        self._failed = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._shut:
            raise io.UnsupportedOperation("standard output is closed")
        return 1

    def isatty(self) -> bool:
        return not self._shut and os.isatty(1)

    def write(self, data: Any) -> int:
        if self._failed:
            return len(data)
        try:
            if self._shut:
                raise OSError(0, "it is closed")
            return os.write(1, data)
        except OSError as error:
            self._failed = True
            raise OutputError(f"standard output cannot be written ({error.strerror}); send it to a file or terminal that "
                              "takes it") from None


def guard() -> None:
    """Put our own stream in place of the interpreter's standard output, and something in place of a closed error."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    closed = sys.stdout is None
    if not closed:
        sys.stdout.flush()
    encoding = "utf-8" if closed else sys.stdout.encoding
    errors = "replace" if closed else sys.stdout.errors
    interactive = not closed and bool(sys.stdout.line_buffering)
    raw = io.BufferedWriter(_Output(closed=closed))
    sys.stdout = io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=interactive)
