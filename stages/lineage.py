"""What a checkpoint came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
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
    pruning: Mapping[str, Any] | None = None
    """Of a checkpoint that was cut out of a larger model (its parent): the importance, the candidate, the choices."""

    def to_dict(self) -> dict[str, Any]:
        document = dataclasses.asdict(self)
        return document if self.pruning is not None else {k: v for k, v in document.items() if k != "pruning"}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Lineage:
        try:
            required = {item.name: document[item.name] for item in fields(cls) if item.default is MISSING}
            return cls(**required, **{k: document[k] for k in ("revision", "pruning") if k in document})
        except KeyError as error:
            raise CheckpointError(f"lineage has no {error}; expected the lineage of a training checkpoint") from None
