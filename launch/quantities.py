"""Amounts as people write them on the command line: 5GB, 300B tokens, 5e20, lists with commas."""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError

from stages.errors import InputError


class QuantityError(InputError, ArgumentTypeError):
    """Says what was found and what was expected; argparse, which calls these functions, puts the option before it."""


_AMOUNTS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {"": 1.0, "B": 1.0, **{f"{letter}{middle}B": float((1024 if middle else 1000) ** power)
                                for power, letter in enumerate("KMGT", 1) for middle in ("", "i")}}  # fmt: skip


def amount(text: str, option: str = "") -> float:
    """A number above 0, with k, M, B (or G) or T for thousands to trillions. Raises InputError."""
    return _scaled(text, _AMOUNTS, "a number above 0 such as 5e20, 400k or 300B", option)


def size(text: str) -> float:
    """Bytes: 5GB is 5e9, 5GiB is 5 * 2^30. Raises InputError."""
    return _scaled(text, _BYTES | {f"k{rest}": _BYTES[f"K{rest}"] for rest in ("B", "iB")}, "bytes such as 5GB or 700MiB", "")


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas. Raises InputError."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*", text):
        raise QuantityError(f"{text!r}; expected whole numbers above 0 with commas between, such as 1,2,4")
    return tuple(int(part) for part in text.split(","))


def names(text: str) -> tuple[str, ...]:
    """Parts with commas between. Raises InputError for an empty one."""
    parts = tuple(part.strip() for part in text.split(","))
    if not all(parts):
        raise QuantityError(f"{text!r} has an empty part; expected names with commas between")
    return parts


def _scaled(text: str, units: dict[str, float], expected: str, option: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*([A-Za-z]*)", text)
    value = float(match[1]) * units[match[2]] if match and match[2] in units else 0.0
    if not 0 < value < math.inf:
        raise QuantityError(f"{option + ' ' if option else ''}{text!r}; expected {expected}")
    return value
