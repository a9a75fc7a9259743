"""The wire: one JSON object a line, checked before it is believed. docs/devices.md has it to the byte."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

from search.agent.measuring import Gate

PROTO = 1
MAX_REQUEST = 1 << 20
"""Bytes of a line to the agent, its end included."""
MAX_ANSWER = 16 << 20
CHUNK = 512 << 10
"""Bytes of a file in one `put`; as base64 they fit a line."""
SHA256 = re.compile(r"[0-9a-f]{64}")


class Reader(Protocol):
    def readline(self, size: int = ..., /) -> bytes: ...
    def close(self) -> None: ...


class Writer(Protocol):
    def write(self, data: bytes, /) -> Any: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class ProtocolError(ValueError):
    """The other side sent something that is not of this protocol."""


def encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def read_message(stream: Reader, limit: int) -> dict[str, Any] | None:
    """The next line's object; None at the end. Reads no more than `limit` bytes for it. Raises ProtocolError."""
    line = stream.readline(limit + 1)
    if not line:
        return None
    if len(line) > limit:
        raise ProtocolError(f"a line of more than {limit} bytes")
    if not line.endswith(b"\n"):
        raise ProtocolError("the connection ended inside a line")
    try:
        found = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ProtocolError(f"{line[:60]!r} is no JSON") from None
    if not isinstance(found, dict):
        raise ProtocolError(f"{line[:60]!r} is no JSON object")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


class Fields:
    """A request's fields, each taken with its type and bounds. All raise ProtocolError with the field's name."""

    def __init__(self, message: Mapping[str, Any]) -> None:
        self.message = message

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float:
        value = self.message.get(name, default)
        numeric = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not numeric or not least <= value <= most:
            raise ProtocolError(f"{name}={str(value)[:40]!r}; expected a number from {least:g} to {most:g}")
        return value

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int:
        value = self.number(name, least, most, default)
        if not isinstance(value, int):
            raise ProtocolError(f"{name}={value!r}; expected a whole number")
        return value

    def text(self, name: str, most: int, default: str | None = None) -> str:
        value = self.message.get(name, default)
        if not isinstance(value, str) or len(value) > most:
            raise ProtocolError(f"{name}={str(value)[:40]!r}; expected a string of at most {most} characters")
        return value

    def sha256(self, name: str) -> str:
        value = self.message.get(name)
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            raise ProtocolError(f"{name}={str(value)[:40]!r}; expected the 64 hexadecimal digits of a SHA-256")
        return value

    def integers(self, name: str, most_items: int, most: int) -> tuple[int, ...]:
        value = self.message.get(name, [])
        if not isinstance(value, list) or len(value) > most_items:
            raise ProtocolError(f"{name}={str(value)[:40]!r}; expected a list of at most {most_items}")
        return tuple(Fields({name: item}).integer(name, 0, most) for item in value)

    def gate(self) -> Gate:
        """The field `gate`, with the defaults of search.agent.measuring.Gate."""
        found = self.message.get("gate") or {}
        if not isinstance(found, dict):
            raise ProtocolError(f"gate={str(found)[:40]!r}; expected an object")
        fields = Fields(found)
        limits = {name: None if found.get(name) is None else fields.number(name, -50, 200) for name in ("max_c", "throttle_c")}
        return Gate(limits["max_c"], fields.number("max_wait_s", 0, 3600, 600), limits["throttle_c"])
