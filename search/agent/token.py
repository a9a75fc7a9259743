"""The secret that a search shows an agent. It is read from a file or the environment and is never logged."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

TOKEN_VARIABLE = "POCKETFORGE_AGENT_TOKEN"
FILE_VARIABLE = "POCKETFORGE_AGENT_TOKEN_FILE"
MIN_LENGTH = 16


class TokenError(ValueError):
    """No usable token."""


def load_token(file: Path | None = None) -> str | None:
    """From the file, else POCKETFORGE_AGENT_TOKEN, else the file POCKETFORGE_AGENT_TOKEN_FILE; None where there is none.

    Raises TokenError: a file that others may read, a token that can be guessed.
    """
    if file is None and (value := os.environ.get(TOKEN_VARIABLE)):
        return _checked(value.strip(), TOKEN_VARIABLE)
    if file is None and (name := os.environ.get(FILE_VARIABLE)):
        file = Path(name)
    if file is None or not file.exists():
        return None
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise TokenError(f"{file} has the mode {mode:o}: others may read the token; chmod 600 it")
    return _checked(file.read_text(encoding="utf-8").strip(), str(file))


def make_token(file: Path | None = None) -> str:
    """A new one, kept in the file where one is named."""
    token = secrets.token_urlsafe(32)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(token + "\n")
    return token


def same_token(given: object, expected: str) -> bool:
    """Compared in a time that does not depend on how much of it is right."""
    return isinstance(given, str) and secrets.compare_digest(given.encode(), expected.encode())


def _checked(token: str, source: str) -> str:
    if len(token) < MIN_LENGTH or not token.isascii() or not token.isprintable():
        raise TokenError(f"the token in {source} has {len(token)} characters; expected {MIN_LENGTH} or more, printable ASCII")
    return token
