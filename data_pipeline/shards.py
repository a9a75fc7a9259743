"""Token shards: the tokenised documents of one source, as files that can be mapped into memory.

A shard is a folder: `tokens.bin` (uint16, or uint32 for more than 65,536 tokens), `documents.idx` (end of each document
in tokens, uint64), for conversations `loss.mask` (one bit a token), and `meta.json`. It appears by one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError

FORMAT = "pocketforge-tokens-1"
_ALWAYS_HASHED = 256 << 20
"""Larger shards are checked by length alone on opening: reading them whole would delay the first batch."""


@dataclass(frozen=True)
class ShardMeta:
    """What `meta.json` says of a shard."""

    source: str
    tokenizer: str
    vocab_size: int
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    dropped: int
    """Conversations left out because nothing in them is supervised."""
    sha256: dict[str, str]
    format: str = FORMAT


@dataclass
class ShardCounts:
    """What the producer of a shard's documents counts while it goes."""

    text_bytes: int = 0
    dropped: int = 0


@dataclass(frozen=True)
class Shard:
    """Tokenised documents. Document d is tokens[ends[d - 1]:ends[d]]."""

    path: Path
    meta: ShardMeta
    tokens: np.ndarray
    ends: np.ndarray
    mask: np.ndarray | None
    """uint8 of packed bits (little endian within a byte); None when every token counts."""

    def mask_bits(self, start: int, stop: int) -> np.ndarray:
        """Whether tokens[start:stop] are supervised, bool."""
        if self.mask is None:
            return np.ones(stop - start, dtype=bool)
        bits = np.unpackbits(self.mask[start // 8 : (stop + 7) // 8], bitorder="little")
        return bits[start % 8 : start % 8 + stop - start].astype(bool)


def token_dtype(vocab_size: int) -> str:
    """uint16 as long as every id fits."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def write_shard(
    path: Path,
    encoded: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    *,
    source: str,
    tokenizer: str,
    vocab_size: int,
    counts: ShardCounts,
) -> None:
    """Write a shard at `path`, whole or not at all.

    Args:
        encoded: groups of documents: (ids of all of them, length of each, supervised flag of each token or None).
        counts: read after `encoded` is used up (its producer fills them in).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        lengths, masks, total = [np.zeros(0, np.int64)], [], 0
        dtype = token_dtype(vocab_size)
        with (temporary / "tokens.bin").open("wb") as stream:
            for ids, sizes, mask in encoded:
                stream.write(ids.astype(dtype).tobytes())
                lengths.append(sizes)
                total += len(ids)
                if mask is not None:
                    masks.append(mask)
        sizes = np.concatenate(lengths)
        if total == 0:
            raise DataError(f"source {source}: no tokens; expected at least one document that can be trained on")
        np.cumsum(sizes).astype("uint64").tofile(temporary / "documents.idx")
        names = ["tokens.bin", "documents.idx"]
        if masks:
            np.packbits(np.concatenate(masks), bitorder="little").tofile(temporary / "loss.mask")
            names.append("loss.mask")
        hashes = {name: _sha256(temporary / name) for name in names}
        meta = ShardMeta(
            source, tokenizer, vocab_size, dtype, total, len(sizes), counts.text_bytes, counts.dropped, hashes
        )
        (temporary / "meta.json").write_text(json.dumps(asdict(meta), indent=1), "utf-8")
        os.rename(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the space and rights there") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_shard(path: Path) -> Shard:
    """Map a shard into memory after checking it. DataError names the file that is missing, cut or changed."""
    file = path / "meta.json"
    try:
        meta = ShardMeta(**json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: not the description of a token shard ({error}); {_REMEDY} {path}") from error
    if meta.format != FORMAT or meta.dtype != token_dtype(meta.vocab_size) or meta.tokens < 1:
        raise DataError(f"{file}: not a {FORMAT} shard; {_REMEDY} {path}")
    tokens = _map(path / "tokens.bin", meta, meta.dtype, meta.tokens)
    ends = _map(path / "documents.idx", meta, "uint64", meta.documents)
    mask = _map(path / "loss.mask", meta, "uint8", (meta.tokens + 7) // 8) if "loss.mask" in meta.sha256 else None
    if int(ends[-1]) != meta.tokens:
        raise DataError(f"{path / 'documents.idx'}: ends at {int(ends[-1])}, expected {meta.tokens}; {_REMEDY} {path}")
    return Shard(path, meta, tokens, ends, mask)


_REMEDY = "it is rebuilt from the source when you delete"


def _map(file: Path, meta: ShardMeta, dtype: str, count: int) -> np.ndarray:
    expected = count * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.is_file() else -1
    if found != expected:
        state = "missing" if found < 0 else f"{found} bytes"
        raise DataError(f"{file}: {state}, expected {expected} bytes; {_REMEDY} {file.parent}")
    if expected <= _ALWAYS_HASHED and _sha256(file) != meta.sha256.get(file.name):
        raise DataError(f"{file}: content does not match its sha256; {_REMEDY} {file.parent}")
    return np.memmap(file, dtype=dtype, mode="r", shape=(count,))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
