"""Reads back which steps the files of a W&B run hold.

W&B writes what it is given in blocks, seconds later, and a kill loses what was not written. Only its files know, so a run
that goes on asks them what is still to be logged. They are logs in LevelDB's format (records in blocks of 32 KiB) of
protocol buffers; `wandb sync` reads the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, struct.Struct("<IHB")
"""A record's header: checksum, length, kind."""
MARK = b":W&B"
WHOLE, LAST = 1, 4
"""Kinds that end a record; 2 and 3 are its first and middle parts."""


def held_steps(folder: Path, run_id: str) -> set[int]:
    """Steps in all files of this run below `folder`/wandb, offline and online ones, of this and of earlier starts."""
    return {step for path in sorted(folder.glob(f"wandb/*run-*/run-{run_id}.wandb")) for step in _steps(path)}


def _steps(path: Path) -> Iterator[int]:
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is loaded

    for data in records(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(data)
        except DecodeError:  # a file that was cut and written over; what can be read counts
            continue
        if record.WhichOneof("record_type") == "history":
            yield record.history.step.num


def records(data: bytes) -> Iterator[bytes]:
    """Whole records only; one that a kill cut short is not there."""
    if not data.startswith(MARK):
        return
    at, parts = len(MARK) + 3, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:  # too little room for a header: the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        at += HEADER.size
        parts += data[at : at + length]
        if at + length > len(data):
            return
        at += length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
