"""Writing and reading a packed file (`model.pocket`): a header, JSON metadata, aligned tensors, checksums.

The C++ loader checks a file from a stranger; this module writes files and reads them back for tests and tools.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kernels import packed_layout

MAGIC, VERSION, BYTE_ORDER = b"PKTFORGE", 1, 0x01020304
HEADER = struct.Struct("<8sIIQQQQIII")
"""magic, version, byte order, file bytes, metadata offset and bytes, data offset, metadata CRC, two zeros; its CRC follows."""
HEADER_BYTES = 64

Encoding = Literal["int4_g32", "int8_row", "f32", "bytes"]


class PackedFileError(ValueError):
    """A packed file that cannot be written or read."""


@dataclass(frozen=True)
class PackedTensor:
    """One tensor's bytes as they lie in the file."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


def int4(name: str, codes: NDArray[np.int8], scales: NDArray[np.float16]) -> PackedTensor:
    """A matrix of codes [rows, k] with fp16 scales [rows, k / 32]."""
    return PackedTensor(name, "int4_g32", codes.shape, packed_layout.pack_int4(codes, scales))


def int8(name: str, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> PackedTensor:
    """A matrix of codes [rows, k] with one fp32 scale a row."""
    return PackedTensor(name, "int8_row", codes.shape, packed_layout.pack_int8(codes, scales))


def f32(name: str, values: NDArray[np.float32]) -> PackedTensor:
    """A vector [n], or rows of floats [rows, n]."""
    return PackedTensor(name, "f32", values.shape, np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(-1))


def blob(name: str, data: bytes) -> PackedTensor:
    """Bytes that the runtime does not look into."""
    return PackedTensor(name, "bytes", (len(data),), np.frombuffer(data, np.uint8))


def write_packed(
    path: str | Path, metadata: Mapping[str, Any], tensors: Iterable[Callable[[], PackedTensor]],
    crc32c: Callable[[NDArray[np.uint8]], int],
) -> None:  # fmt: skip
    """Write the file whole or not at all. `tensors` are made one at a time, so one of them is in memory at once.

    The metadata stands before the tensors and holds their places, so they are written first, to their own file.

    Raises:
        PackedFileError: the file exists.
    """
    path = Path(path)
    if path.exists():
        raise PackedFileError(f"{path} exists; name another file, nothing is overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    data_path, part = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("data", "part"))
    try:
        entries, offset = [], 0
        with data_path.open("wb") as data:
            for make in tensors:
                tensor = make()
                entries.append({
                    "name": tensor.name, "encoding": tensor.encoding, "shape": list(tensor.shape), "offset": offset,
                    "bytes": tensor.data.nbytes, "crc32c": crc32c(tensor.data),
                })  # fmt: skip
                data.write(tensor.data.data)
                padding = -tensor.data.nbytes % packed_layout.ALIGNMENT
                data.write(b"\0" * padding)
                offset += tensor.data.nbytes + padding
        text, data_offset = _metadata_text(metadata, entries)
        checksum = crc32c(np.frombuffer(text, np.uint8))
        head = HEADER.pack(
            MAGIC, VERSION, BYTE_ORDER, data_offset + offset, HEADER_BYTES, len(text), data_offset, checksum, 0, 0
        )  # fmt: skip
        with part.open("wb") as file, data_path.open("rb") as data:
            file.write(head + struct.pack("<I", crc32c(np.frombuffer(head, np.uint8))))
            file.write(text.ljust(data_offset - HEADER_BYTES, b"\0"))
            while piece := data.read(1 << 24):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        for leftover in (data_path, part):
            leftover.unlink(missing_ok=True)


def _metadata_text(metadata: Mapping[str, Any], entries: list[dict[str, Any]]) -> tuple[bytes, int]:
    """The JSON with offsets from the start of the file, and where the data starts: each depends on the other's length."""
    data_offset = HEADER_BYTES
    while True:
        moved = [{**entry, "offset": entry["offset"] + data_offset} for entry in entries]
        text = json.dumps({**metadata, "tensors": moved}, ensure_ascii=True, separators=(",", ":")).encode()
        needed = -(-(HEADER_BYTES + len(text)) // packed_layout.ALIGNMENT) * packed_layout.ALIGNMENT
        if needed <= data_offset:
            return text, data_offset
        data_offset = needed


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON of a packed file. Raises PackedFileError for what is none."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEADER_BYTES)
            if len(head) < HEADER_BYTES or head[:8] != MAGIC:
                raise PackedFileError(f"{path}: not a packed model (no PKTFORGE at its start)")
            _, version, _, file_bytes, offset, size, _, _, _, _ = HEADER.unpack(head[:60])
            if version != VERSION or offset + size > min(file_bytes, os.fstat(file.fileno()).st_size):
                raise PackedFileError(f"{path}: version {version} or a damaged header; expected version {VERSION}")
            file.seek(offset)
            return document(file.read(size))
    except (OSError, ValueError) as error:
        if isinstance(error, PackedFileError):
            raise
        raise PackedFileError(f"{path}: cannot be read ({error})") from None


def document(text: bytes) -> dict[str, Any]:
    """A file's JSON. The C++ loader passes over strings that are no UTF-8 and numbers of any length. Raises ValueError."""
    try:
        found = json.loads(text)
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError("its metadata is no JSON object")
    return found


def is_packed(path: str | Path) -> bool:
    """Whether a file starts as a packed model does. Raises PackedFileError for one that cannot be read."""
    path = Path(path)
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(8) == MAGIC
    except OSError as error:
        raise PackedFileError(f"{path}: cannot be read ({error.strerror})") from None
