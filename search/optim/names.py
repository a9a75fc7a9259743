"""What the names and values of a domain say: which names are slots of layers, which slots count, which sizes play which role.

Names that differ in their numbers only and share their values are the slots of one group. Which slots a size leaves idle is
found by asking `repair`. Roles (layers, hidden, ffn, heads, kv) are read from the names; where those say nothing, from the
values: the layers are what idles slots, and the widths of a model are ordered (FFN, hidden, heads, KV heads).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.optim.base import Domain, Flat

Codes = NDArray[np.int64]
Decode = Callable[[NDArray[np.int64]], Flat]
Idle = tuple[int, NDArray[np.bool_]]
"""(column of the size that decides, [its values, slots] active)."""
MOST_KINDS = 8
LARGEST = 1e100
"""Products of three such numbers are still finite."""
LARGEST_RATIO = 16
"""An FFN width up to here is a multiple of the hidden width."""
ROLES = {"kv": r"kv", "ffn": r"ffn|ff|mlp|inter", "repeat": r"repeat", "layers": r"layer|depth|block|^n?_?l$",
         "head_dim": r"head_?(dim|size)", "heads": r"head", "hidden": r"hidden|model|width|embed|dim|^d$"}  # fmt: skip
"""What a name must look like to play a role, in the order in which they are tried."""
NEEDED = ("ffn", "hidden", "heads", "kv")
"""Roles that a model's size needs beside its layers, by the size of their values."""


def slot_groups(domain: Domain) -> list[list[int]]:
    """Columns of three or more names that differ by their numbers only and share their values, in the order of the numbers.

    Names without numbers are a group where four or more in a row hold the same text values.
    """
    found: dict[tuple[str, str], list[tuple[tuple[int, ...], int]]] = {}
    rows: list[list[int]] = []
    before = None
    for column, (name, values) in enumerate(domain.choices.items()):
        values, numbers = list(values), tuple(int(digits) for digits in re.findall(r"\d+", name))
        signature = str(values) if 1 < len(values) <= MOST_KINDS else None
        if signature is not None and numbers:
            found.setdefault((re.sub(r"\d+", "#", name), signature), []).append((numbers, column))
        unnumbered = signature if not numbers and all(isinstance(value, str) for value in values) else None
        if unnumbered is None or unnumbered != before:
            rows.append([])
        if unnumbered is not None:
            rows[-1].append(column)
        before = unnumbered
    numbered = [[column for _, column in sorted(group)] for group in found.values() if len(group) >= 3]
    return numbered + [row for row in rows if len(row) >= 4]


def find_idle(
    domain: Domain, decode: Decode, group: list[int], numeric: Sequence[int], draw: np.random.Generator
) -> Idle | None:
    """Which slots of a group count; None where all always do."""
    if domain.repair is None:
        return _guess_idle(domain, group, numeric)
    for column in numeric:
        tables = [_probe(domain, decode, group, column, draw) for _ in range(3)]
        if not tables[0].all() and all((table == tables[0]).all() for table in tables):
            # Another size may decide and just have been equal in the probes: only one that varies is taken.
            if len({tuple(row) for row in tables[0].tolist()}) > 1:
                return column, tables[0]
    return None


def _probe(domain: Domain, decode: Decode, group: list[int], column: int, draw: np.random.Generator) -> NDArray[np.bool_]:
    sizes = np.array([len(values) for values in domain.choices.values()])
    table = np.ones((sizes[column], len(group)), dtype=bool)
    for value in range(sizes[column]):
        code = draw.integers(sizes)
        code[column] = value
        for at, slot in enumerate(group):
            seen = set()
            for kind in range(sizes[slot]):
                code[slot] = kind
                seen.add(domain.key(decode(code)))
            table[value, at] = len(seen) > 1
    return table


def _guess_idle(domain: Domain, group: list[int], numeric: Sequence[int]) -> Idle | None:
    for column in numeric:
        name, values = list(domain.choices.items())[column]
        steps = np.diff(np.array(list(values), dtype=np.float64))
        named = re.search(ROLES["layers"], name, re.IGNORECASE)
        if max(values) == len(group) and min(values) >= 1 and (named or (len(values) > 1 and (steps == 1).all())):
            return column, np.arange(len(group)) < np.array(list(values))[:, None]
    return None


def find_roles(domain: Domain, numeric: Sequence[int], layers: int | None) -> dict[str, int]:
    """Role -> column, complete or empty. layers: the column that decides which slots count."""
    found: dict[str, int] = {}
    names, tops = list(domain.choices), {i: max(map(abs, list(domain.choices.values())[i]), default=0) for i in numeric}
    for column in numeric:
        role = next((role for role, pattern in ROLES.items() if re.search(pattern, names[column].lower())), None)
        if role is not None and role not in found:
            found[role] = column
    if layers is not None:
        found = {"layers": layers, **{role: column for role, column in found.items() if column != layers and role != "layers"}}
    if not {"layers", *NEEDED} <= set(found):  # a lone letter says something only among its like
        found = {role: column for role, column in found.items() if column == layers or len(names[column]) > 2}
    lacking = [role for role in NEEDED if role not in found]
    spare = sorted((column for column in numeric if column not in found.values()), key=lambda column: -tops[column])
    if lacking and len(spare) == len(lacking):
        found.update(zip(lacking, spare, strict=True))
        ffn, hidden = found.get("ffn", layers), found.get("hidden", layers)
        if "ffn" in lacking and hidden is not None and ffn is not None and LARGEST_RATIO < tops[ffn] < tops[hidden]:
            found["ffn"], found["hidden"] = hidden, ffn
    positive = all(min(list(domain.choices.values())[column]) > 0 for column in found.values())
    return found if positive and {"layers", *NEEDED} <= set(found) else {}


def is_number(value: Any) -> bool:
    """One that can be computed with: products of NaN, infinities and the like are none, so a name that has them is of kinds."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-LARGEST < value < LARGEST)
