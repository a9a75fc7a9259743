"""Rows and text out of files: plain, gzip, Zstandard, JSON Lines, Parquet. Damage is named, never passed over."""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError

_KINDS = {".txt": "text", ".md": "text", ".text": "text", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
          ".parquet": "parquet"}  # fmt: skip
_CHUNK = 1 << 20
_PIECE_BYTES = 16_384
_HASH_LIMIT = 1 << 30


def resolve(path: str, name: str) -> str:
    """Expand `~` and variables. DataError names a variable that is not set."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if "$" in expanded:
        raise DataError(f"source {name}: path {path} names a variable that is not set; set it or give a whole path")
    return expanded


def expand(path: str, name: str) -> list[Path]:
    """The files of a source in a fixed order: one file, all known files below a folder, or a glob."""
    if not path:
        raise DataError(f"source {name}: no path; give a file, a folder or a glob")
    expanded = Path(resolve(path, name))
    if expanded.is_file():
        return [expanded]
    if expanded.is_dir():
        found = [file for file in sorted(expanded.rglob("*")) if file.is_file() and _kind(file) is not None]
    else:
        found = [Path(match) for match in sorted(glob.glob(str(expanded), recursive=True)) if Path(match).is_file()]
    if not found:
        raise DataError(f"source {name}: no data file at {expanded}; expected text, .jsonl, .parquet (also .gz, .zst)")
    return found


def _kind(file: Path) -> str | None:
    suffix = (file.with_suffix("") if file.suffix in (".gz", ".zst") else file).suffix
    return _KINDS.get(suffix.lower())


def kind_of(file: Path) -> str:
    """`text`, `jsonl` or `parquet`, by the file's ending."""
    kind = _kind(file)
    if kind is None:
        known = ", ".join(_KINDS)
        raise DataError(f"{file}: unknown ending; expected one of {known} (also with .gz or .zst), or set `format`")
    return kind


def content_key(file: Path) -> str:
    """A hash that changes with the file: of its bytes, or of size and time where reading it twice takes minutes."""
    try:
        status = file.stat()
        if status.st_size > _HASH_LIMIT:
            return f"{file}:{status.st_size}:{status.st_mtime_ns}"
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check the path and the rights") from error


def valid_text(text: str) -> str:
    """The text with lone surrogates, which JSON can spell and UTF-8 cannot, replaced."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()


def read_lines(file: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file, ended by newline only: U+2028 and its like are part of a text."""
    try:
        if file.suffix == ".zst":
            yield from _zstd_lines(file)
        elif file.suffix == ".gz":
            with gzip.open(file, "rb") as stream:
                yield from stream
        else:
            with file.open("rb") as stream:
                yield from stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: damaged or cut short ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}); check the path and the rights") from error


def _zstd_lines(file: Path) -> Iterator[bytes]:
    """The stream reader of `zstandard` ends silently in a cut file, so frames are followed here one by one."""
    import zstandard

    context = zstandard.ZstdDecompressor()
    rest = b""
    with file.open("rb") as stream:
        frame = None
        while chunk := stream.read(_CHUNK):
            while chunk:
                frame = context.decompressobj() if frame is None else frame
                try:
                    block = rest + frame.decompress(chunk)
                except zstandard.ZstdError as error:
                    raise DataError(f"{file}: damaged ({error}); fetch the file again") from error
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.unused_data, None
                *lines, rest = block.split(b"\n")
                yield from (line + b"\n" for line in lines)
    if frame is not None:
        raise DataError(f"{file}: cut short inside a Zstandard frame; fetch the file again")
    if rest:
        yield rest


def read_rows(file: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSON Lines or Parquet file. DataError names file and line; a file without rows is an error."""
    empty = True
    for row in _parquet_rows(file) if kind == "parquet" else _json_rows(file):
        empty = False
        yield row
    if empty:
        raise DataError(f"{file}: no rows; expected at least one; remove the file or fill it")


def _json_rows(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter: nested thousands deep
            raise DataError(f"{file}: line {number} is not JSON ({error}); correct or remove the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}: line {number} holds {type(row).__name__}; expected a JSON object a line")
        yield row


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        line = str(error).strip().split("\n")[0]
        raise DataError(f"{file}: not a readable Parquet file ({line}); fetch the file again") from error


def read_text(file: Path) -> str:
    """The whole text of a plain-text file. DataError when it is empty or not UTF-8."""
    data = b"".join(read_lines(file))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); convert the file") from error
    if not text.strip():
        raise DataError(f"{file}: no text; expected UTF-8 text; remove the file or fill it")
    return text


def read_text_pieces(file: Path) -> Iterator[str]:
    """A plain-text file as documents of about 16 KiB, cut at blank lines, so that part of it can be held out."""
    paragraphs = read_text(file).split("\n\n")
    piece: list[str] = []
    size = 0
    for number, paragraph in enumerate(paragraphs):
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= _PIECE_BYTES or number == len(paragraphs) - 1:
            text = "\n\n".join(piece)
            piece, size = [], 0
            if text.strip():
                yield text
