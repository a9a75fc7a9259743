"""What can go wrong in a stage, by who can mend it. `launch/cli.py` turns these into exit statuses."""

from __future__ import annotations


class InputError(ValueError):
    """The user's input is wrong: one line that says what was found, what was expected, what to do. Exit status 2."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or of another model."""


class RunError(RuntimeError):
    """A run failed for a reason that its user can understand in one line. Exit status 1."""


class NonFiniteError(RunError):
    """A loss or gradient norm was NaN or infinite; no optimizer step was taken with it."""


class LostWorkerError(RunError):
    """A peer died. Another start can succeed, so a launcher that restarts worker groups must not take it as final."""
