"""Damaged packed files: bytes of a good one, changed, with checksums and offsets put right."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kernels.packed_file import HEADER, HEADER_BYTES
from kernels.runtime import crc32c, executable_path

Change = Callable[[bytes], bytes]


def checksum(data: bytes) -> int:
    return crc32c(np.frombuffer(bytes(data), np.uint8))


def with_header(data: bytes, **changes: Any) -> bytes:
    """The file with fields of its header changed and the header's checksum right."""
    names = ("magic", "version", "byte_order", "file_bytes", "metadata_offset", "metadata_bytes", "data_offset",
             "metadata_crc32c", "reserved", "unused")  # fmt: skip
    fields = dict(zip(names, HEADER.unpack(data[:60]), strict=True)) | changes
    head = HEADER.pack(*(fields[name] for name in names))
    return head + struct.pack("<I", checksum(head)) + data[HEADER_BYTES:]


def with_metadata(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file with its JSON changed by `change(dict) -> dict or bytes`, every checksum and offset right."""
    start, size, data_offset = HEADER.unpack(data[:60])[4:7]
    document = json.loads(data[start : start + size])
    changed = change(document)
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    room = -(-(HEADER_BYTES + len(text) + 4096) // 64) * 64
    if not isinstance(changed, bytes):
        for tensor in changed.get("tensors", []):
            if isinstance(tensor, dict) and isinstance(tensor.get("offset"), int):
                tensor["offset"] += room - data_offset
        text = json.dumps(changed).encode()
    body = data[:HEADER_BYTES] + text.ljust(room - HEADER_BYTES, b"\0") + data[data_offset:]
    return with_header(body, file_bytes=len(body), metadata_bytes=len(text), data_offset=room, metadata_crc32c=checksum(text))


def model_field(name: str, value: Any) -> Change:
    return lambda data: with_metadata(data, lambda d: {**d, "model": {**d["model"], name: value}})


def flipped(position: int) -> Change:
    def change(data: bytes) -> bytes:
        damaged = bytearray(data)
        damaged[position] ^= 0x40
        return bytes(damaged)

    return change


def replay_mutations(good: bytes, folder: Path) -> dict[str, int]:
    """What `pocketforge-replay` says of 400 seeded mutations: a crash would be its status."""
    draw = random.Random(7)
    start, size = HEADER.unpack(good[:60])[4:6]
    paths = []
    for index in range(400):
        data = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 5])):
            region = draw.choice([(8, 60), (start, start + size), (start, start + size), (0, len(data))])
            at = draw.randrange(*region)
            kind = draw.random()
            if kind < 0.5:
                data[at] = draw.choice([0, 0x30, 0x39, 0x22, 0x7D, 0xFF, draw.randrange(256)])
            elif kind < 0.8:  # another number where one stands
                data[at : at + 1] = draw.choice([b"0", b"9", b"99999999", b"-1", b"1e9", b"[", b'"'])[:1]
            elif kind < 0.9:
                del data[at : at + draw.randrange(1, 100)]
            else:
                data[at:at] = data[at : at + draw.randrange(1, 100)]
        paths.append(folder / f"{index}.pocket")
        paths[-1].write_bytes(bytes(data))
    replay = executable_path().with_name("pocketforge-replay")
    done = subprocess.run([replay, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    return json.loads(done.stdout)
