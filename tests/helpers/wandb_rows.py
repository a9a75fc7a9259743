"""What W&B's files in a folder hold, as a test sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.wandb_file import records


def logged(folder: Path, kind: str = "history") -> list[Any]:
    """Records of one kind in all runs' files below `folder`/wandb, in order of their starts; history as rows of values."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        for data in records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    if kind != "history":
        return found
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in found]
