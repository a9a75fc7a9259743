"""Dotted overrides of a recipe, as the command line has them (`--train.steps 20`)."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from stages.errors import InputError


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """Set dotted keys. A value is read as TOML where it is TOML (numbers, true, lists), else as text; `none` unsets."""
    result = json.loads(json.dumps(values))
    for key, text in overrides.items():
        if not is_unicode(text):
            raise InputError(f"--{key}={text!r} is not UTF-8; expected text in UTF-8")
        *parents, last = key.replace("-", "_").split(".")
        node: Any = result
        for depth, part in enumerate(parents):
            index = int(part) if isinstance(node, list) and part.isdigit() and int(part) < len(node) else part
            if isinstance(node, dict):
                node = node.setdefault(part, {})
            elif isinstance(node, list) and isinstance(index, int):
                node = node[index]
            else:
                raise InputError(f"--{key}: {'.'.join(parents[:depth])} has no part {part!r}")
        if not isinstance(node, dict):
            raise InputError(f"--{key}: {'.'.join(parents)} is a value, not a group of keys; drop .{last}")
        if text.lower() == "none":
            node.pop(last, None)
        else:
            node[last] = _parse(text)
    return result


def is_unicode(text: str) -> bool:
    """Whether an argument can be written as UTF-8: bytes that were none reach us as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also for a number of thousands of digits, which tomllib does not catch
        return text
