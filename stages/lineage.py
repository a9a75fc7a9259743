"""What a checkpoint came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stages.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """The document `lineage` of a checkpoint."""

    parent: str | None
    """Checkpoint that the stage started from; None for random weights."""
    recipe_hash: str
    data_fingerprint: str
    tokens_seen: int
    """Tokens trained on so far, the parents' included."""
    stage: str
    step: int
    revision: str = ""
    """Git commit of the code; empty where it was not a repository."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Lineage:
        try:
            return cls(**{item.name: document[item.name] for item in fields(cls)})
        except KeyError as error:
            raise CheckpointError(f"lineage has no {error}; expected the lineage of a training checkpoint") from None
