"""The one exception of this folder."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used: one line that says what was found, what was expected and what to do."""
