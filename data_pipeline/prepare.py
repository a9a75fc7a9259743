"""From a stage's description to rows that can be read: tokenizer, shards, packing, plan.

Everything made lies in a cache folder under the hash of what it was made from, appears by a rename, and is made once
however many processes ask: the first takes a lock, the others wait and find it there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from data_pipeline import files
from data_pipeline.chat import layout_name, render_batch
from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.errors import DataError
from data_pipeline.mixture import Mixture
from data_pipeline.packing import PackIndex, load_index, pack, pack_chats, save_index
from data_pipeline.shards import Shard, ShardCounts, open_shard, write_shard
from data_pipeline.sources import Document, choose, read_documents
from data_pipeline.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_GROUP_BYTES = 4 << 20
"""Text handed to the encoder at once."""
_WARN_PASSES = 4.0


@dataclass(frozen=True)
class PreparedSource:
    """One source, tokenised and packed."""

    config: SourceConfig
    shard: Shard
    index: PackIndex


@dataclass(frozen=True)
class PlanRow:
    """What a run takes from one source."""

    source: str
    sequences: int
    tokens: int
    """Predictions, estimated as the sequences times the source's mean."""
    passes: float
    share: float


@dataclass(frozen=True)
class PreparedStage:
    """A stage's data, ready to be read. `fingerprint` changes with anything that changes the order or the tokens."""

    sources: tuple[PreparedSource, ...]
    seq_len: int
    pad_id: int
    fingerprint: str

    def mixture(self, seed: int) -> Mixture:
        """The order of the sequences for this seed."""
        weights = [source.config.weight for source in self.sources]
        return Mixture([source.index.rows for source in self.sources], [(0, weights)], seed)

    def plan(self, steps: int, global_batch: int, seed: int = 0) -> list[PlanRow]:
        """Sequences, tokens and passes of each source. DataError where one would be repeated above its `max_passes`."""
        total = steps * global_batch
        rows = []
        for source, count in zip(self.sources, self.mixture(seed).counts(total).tolist(), strict=True):
            index, name = source.index, source.config.name
            passes = count / index.rows
            if passes > source.config.max_passes:
                raise DataError(
                    f"source {name}: {steps} steps of {global_batch} rows read it {passes:.1f} times, more than "
                    f"max_passes={source.config.max_passes:g}; take fewer steps, lower its weight or give more data"
                )
            if passes > _WARN_PASSES:
                logger.warning("source %s is read %.1f times", name, passes)
            rows.append(PlanRow(name, count, count * index.predictions // index.rows, passes, count / max(total, 1)))
        return rows


def ensure_tokenizer(config: TokenizerConfig, data: DataConfig, cache_dir: str | Path, seed: int) -> Tokenizer:
    """Load the tokenizer that the configuration names, or train one on the training part of the sources (once)."""
    if config.path:
        return Tokenizer.from_file(config.path)
    parts = [source_key(source, data, seed) for source in data.sources]
    weights = [source.weight for source in data.sources]
    key = _key({"sources": parts, "weights": weights, "config": asdict(config), "seed": seed, "version": 1})
    folder = Path(cache_dir) / "tokenizers"
    file = folder / f"{key}.json"
    with _locked(folder, key):
        if not file.is_file():
            started = time.perf_counter()
            texts = _tokenizer_texts(config, data, seed)
            Tokenizer.train(texts, config.vocab_size).save(file)
            logger.info("trained a tokenizer of %d tokens in %.1f s", config.vocab_size, time.perf_counter() - started)
    return Tokenizer.from_file(file)


def _tokenizer_texts(config: TokenizerConfig, data: DataConfig, seed: int) -> Iterator[str]:
    total = sum(source.weight for source in data.sources)
    for source in data.sources:
        limit = max(int(config.train_bytes * source.weight / total), 1)
        documents = read_documents(source, part="train", held_out_fraction=data.held_out_fraction, seed=seed)
        for document in choose(documents, limit, seed):
            yield document.text


def prepare_stage(
    config: DataConfig, tokenizer: Tokenizer, seq_len: int, cache_dir: str | Path, seed: int
) -> PreparedStage:
    """Tokenise and pack what is not in the cache yet, and open it all.

    Args:
        seq_len: predictions a row, at least 1.
        seed: decides which documents are read where a source has `max_bytes`.
    Raises:
        DataError: sources that cannot be read, or damaged files of the cache, by name.
    """
    if not config.sources:
        raise DataError("data.sources: none given; expected at least one source")
    if seq_len < 1:
        raise DataError(f"seq_len={seq_len}: expected at least 1")
    names = [source.name for source in config.sources]
    if len(set(names)) != len(names):
        raise DataError(f"data.sources: names {', '.join(names)} are not unique; rename one")
    if config.kind == "chat":
        layout_name(tokenizer)  # fails early for a vocabulary that cannot end a turn
    cache = Path(cache_dir)
    sources = tuple(_prepare_source(source, config, tokenizer, seq_len, cache, seed) for source in config.sources)
    described = [
        {"name": s.config.name, "weight": s.config.weight, "tokens": s.shard.meta.sha256, "rows": s.index.rows}
        for s in sources
    ]
    fingerprint = _key({"sources": described, "seq_len": seq_len, "packing": config.packing, "kind": config.kind,
                        "tokenizer": tokenizer.fingerprint}, 64)  # fmt: skip
    return PreparedStage(sources, seq_len, tokenizer.pad_id, fingerprint)


def source_key(source: SourceConfig, data: DataConfig, seed: int) -> str:
    """Hash of what decides a source's documents: their content and how they are read, not where they lie."""
    if source.format in ("python_docs", "python_qa"):
        from data_pipeline import embedded

        content = [embedded.content_key()]
    elif source.format == "hf":
        content = [source.path]
    else:
        content = [files.content_key(file) for file in files.expand(source.path, source.name)]
    neutral = replace(source, name="", path="", weight=1.0, max_passes=0.0, license="", gated=False)
    return _key({"content": content, "config": asdict(neutral), "kind": data.kind, "held_out": data.held_out_fraction,
                 "seed": seed if source.max_bytes is not None else None, "version": 1})  # fmt: skip


def _prepare_source(
    source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, seq_len: int, cache_dir: Path, seed: int
) -> PreparedSource:
    key = _key({"source": source_key(source, data, seed), "tokenizer": tokenizer.fingerprint})
    folder = cache_dir / "shards"
    path = folder / key
    index_file = cache_dir / "packs" / f"{key}-{seq_len}-{data.packing}.npz"
    if not (path.is_dir() and index_file.is_file()):
        with _locked(folder, key):
            if not path.is_dir():
                started = time.perf_counter()
                _write(path, source, data, tokenizer, seed)
                logger.info("tokenised %s in %.1f s", source.name, time.perf_counter() - started)
            if not index_file.is_file():
                save_index(_pack(source, open_shard(path), seq_len, data.packing), index_file)
    shard = open_shard(path)
    index = load_index(index_file, shard.meta.tokens)
    if index.dropped or index.cut or shard.meta.dropped:
        logger.info(
            "source %s: %d conversations cut at a turn, %d dropped as too long, %d without anything to learn",
            source.name, index.cut, index.dropped, shard.meta.dropped,
        )  # fmt: skip
    return PreparedSource(source, shard, index)


def _pack(source: SourceConfig, shard: Shard, seq_len: int, mode: str) -> PackIndex:
    if shard.mask is not None:
        return pack_chats(shard.ends, shard.mask_bits(0, shard.meta.tokens), seq_len)
    index = pack(shard.ends, seq_len, mode)
    if index.rows == 0:
        raise DataError(f"source {source.name}: no document has two tokens; expected text to predict; give more data")
    return index


def _write(path: Path, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, seed: int) -> None:
    documents = read_documents(source, part="train", held_out_fraction=data.held_out_fraction, seed=seed)
    counts = ShardCounts()
    encode = _encode_chats if data.kind == "chat" else _encode_texts
    groups = (encode(group, tokenizer, source, counts) for group in _groups(documents, counts))
    write_shard(path, groups, source=source.name, tokenizer=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size,
                counts=counts)  # fmt: skip


def _groups(documents: Iterator[Document], counts: ShardCounts) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        length = len(document.text.encode())
        size += length
        counts.text_bytes += length
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_texts(
    group: list[Document], tokenizer: Tokenizer, source: SourceConfig, counts: ShardCounts
) -> tuple[np.ndarray, np.ndarray, None]:
    encoded = [tokenizer.document(ids) for ids in tokenizer.encode_batch([document.text for document in group])]
    sizes = np.array([len(ids) for ids in encoded], np.int64)
    return np.concatenate([np.array(ids, np.int64) for ids in encoded]), sizes, None


def _encode_chats(
    group: list[Document], tokenizer: Tokenizer, source: SourceConfig, counts: ShardCounts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chats = []
    for document in group:
        if document.messages is None:
            raise DataError(f"source {source.name}: document {document.id} has no `messages`; expected chat data")
        chats.append(document.messages)
    rendered = render_batch(tokenizer, chats)
    kept = [(ids, mask) for ids, mask in rendered if any(mask)]
    counts.dropped += len(rendered) - len(kept)
    ids = np.concatenate([np.zeros(0, np.int64), *(np.array(ids, np.int64) for ids, _ in kept)])
    mask = np.concatenate([np.zeros(0, bool), *(np.array(mask, bool) for _, mask in kept)])
    return ids, np.array([len(ids) for ids, _ in kept], np.int64), mask


def _key(value: object, length: int = 24) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:length]


@contextmanager
def _locked(folder: Path, key: str) -> Iterator[None]:
    """Hold a lock between processes for one item of the cache."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{key}.lock"):
            yield
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder}: cannot be written ({reason}); choose another cache folder") from error
