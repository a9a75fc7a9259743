"""The part of the training sources that is scored and never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.sources import Document, read_documents


def held_out_texts(sources: Sequence[SourceConfig], max_documents: int, fraction: float) -> list[str]:
    """Texts of the held-out documents, at most `max_documents`, an even share from each source."""
    return [document.text for document in _held_out(sources, max_documents, fraction)]


def held_out_chats(sources: Sequence[SourceConfig], max_documents: int, fraction: float) -> list[list[dict[str, Any]]]:
    """Conversations of the held-out part, at most `max_documents`, an even share from each source."""
    chats = []
    for document in _held_out(sources, max_documents, fraction):
        if document.messages is None:
            raise DataError(f"source {document.source}: document {document.id} has no `messages`; expected chat data")
        chats.append(document.messages)
    return chats


def _held_out(sources: Sequence[SourceConfig], max_documents: int, fraction: float) -> list[Document]:
    """Within a source the documents of the smallest hashes come first, so a smaller set is part of a larger one."""
    if not sources or max_documents < 1:
        raise DataError(f"held-out set of {max_documents} documents from {len(sources)} sources: expected one or more")
    queues = [
        sorted(read_documents(_whole(source), part="held_out", held_out_fraction=fraction), key=Document.key)
        for source in sources
    ]
    chosen: list[Document] = []
    for rank in range(max(map(len, queues))):
        chosen += [queue[rank] for queue in queues if rank < len(queue)]
    return chosen[:max_documents]


def _whole(source: SourceConfig) -> SourceConfig:
    """The source without its limit of bytes, which is for training; a stream keeps it, having no end."""
    from dataclasses import replace

    return source if source.format == "hf" else replace(source, max_bytes=None)
