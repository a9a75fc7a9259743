"""All of a small search space, by enumeration: what its own counting is held to."""

from __future__ import annotations

import itertools

from search.space import NUMBERS, Candidate, Space


def everything(space: Space) -> list[Candidate]:
    """Every candidate, filters or not; where experts are a dimension, a dense one for each of its idle values."""
    return [
        Candidate(**dict(zip(NUMBERS, values, strict=True)), attention=kinds)
        for values in itertools.product(*(space.choices[name] for name in NUMBERS))
        for kinds in itertools.product(space.attention, repeat=values[NUMBERS.index("num_layers")])
    ]
