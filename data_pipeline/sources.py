"""Documents and conversations from files, Hugging Face data sets and the running Python.

A source is read in one deterministic order. Its held-out part is chosen by a hash of the content, so that a document is
on the same side in every stage and in every source that holds it; a chat goes by its prompt, which keeps two
answers to one question together.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from data_pipeline import files
from data_pipeline.chat import check_messages
from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError

logger = logging.getLogger(__name__)

Part = Literal["train", "held_out", "all"]


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `text` is never empty; for a conversation it is the contents, one message a paragraph."""

    id: str
    text: str
    source: str
    messages: list[dict[str, Any]] | None = None

    def key(self) -> int:
        """64-bit content hash that decides the held-out side."""
        return _hash64(self.text if self.messages is None else _prompt_text(self.messages))


def _hash64(text: str, salt: bytes = b"") -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=salt).digest(), "little")


def _prompt_text(messages: list[dict[str, Any]]) -> str:
    prompt: list[str] = []
    for message in messages:
        if message["role"] == "assistant" and prompt:
            break
        prompt.append(message["content"])
    return "\n".join(prompt)


def read_documents(
    config: SourceConfig, *, part: Part = "all", held_out_fraction: float = 0.01, seed: int = 0
) -> Iterator[Document]:
    """Documents of one side of a source, in order, at most `config.max_bytes` of text.

    Args:
        part: `train` leaves out the held-out documents, `held_out` gives only them.
        held_out_fraction: share of the documents held out; at least one where the source has two.
        seed: decides which documents are read when `max_bytes` is given.
    Raises:
        DataError: unreadable, damaged or empty input, naming the file.
    """
    documents = _split(_all_documents(config), part, held_out_fraction)
    if config.max_bytes is None:
        return _require(documents, config, part)
    if config.format == "hf":
        # A stream has no end to choose from: its first documents are taken.
        return _require(_first_bytes(documents, config.max_bytes), config, part)
    return _require(iter(choose(documents, config.max_bytes, seed)), config, part)


def choose(documents: Iterable[Document], max_bytes: int, seed: int) -> list[Document]:
    """A seeded random choice of documents of at most `max_bytes` of text together, in their order.

    One pass, about `max_bytes` of text in memory: the documents with the smallest keyed hashes stay. A text that alone
    is too long is cut, so that the answer is empty only for an empty source.
    """
    salt = (seed & (2**64 - 1)).to_bytes(8, "little")
    heap: list[tuple[int, int, int, Document]] = []
    total = 0
    for order, document in enumerate(documents):
        size = len(document.text.encode())
        heapq.heappush(heap, (-_hash64(document.text, salt), order, size, document))
        total += size
        while total > max_bytes and len(heap) > 1:
            total -= heapq.heappop(heap)[2]
    if len(heap) == 1 and total > max_bytes:
        only = heap[0][3]
        if only.messages is not None:
            return []
        text = only.text.encode()[:max_bytes].decode("utf-8", "ignore")
        return [Document(only.id, text, only.source)] if text else []
    return [document for _, _, _, document in sorted(heap, key=lambda item: item[1])]


def _first_bytes(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    left = max_bytes
    for document in documents:
        left -= len(document.text.encode())
        if left < 0:
            return
        yield document


def _split(documents: Iterator[Document], part: Part, fraction: float) -> Iterator[Document]:
    """The documents of one side. A source in which no hash falls below the threshold gives up its smallest one."""
    if part == "all" or (part == "train" and fraction <= 0.0):
        yield from documents
        return
    if fraction <= 0.0:
        return
    threshold = int(fraction * 2**64)
    # Held back while no document is below the threshold: those with the smallest key so far.
    lowest: list[Document] = []
    lowest_key, found, several = 2**64, False, False
    for document in documents:
        key = document.key()
        if key < threshold:
            found = True
            if part == "held_out":
                yield document
            continue
        if found:
            if part == "train":
                yield from (*lowest, document)
                lowest = []
        elif key > lowest_key:
            several = True
            if part == "train":
                yield document
        elif key == lowest_key:
            lowest.append(document)
        else:
            several = several or bool(lowest)
            if part == "train":
                yield from lowest
            lowest, lowest_key = [document], key
    if part == "train" and (found or not several):
        yield from lowest
    elif not found and several and part == "held_out":
        yield from lowest


def _require(documents: Iterator[Document], config: SourceConfig, part: Part) -> Iterator[Document]:
    first = next(documents, None)
    if first is None:
        what = "no held-out documents" if part == "held_out" else "no documents"
        raise DataError(
            f"source {config.name} ({config.path or config.format}): {what}; expected at least one with text; give "
            "more data, or raise held_out_fraction or max_bytes"
        )
    yield first
    yield from documents


def _all_documents(config: SourceConfig) -> Iterator[Document]:
    if config.format in ("python_docs", "python_qa"):
        from data_pipeline import embedded

        yield from embedded.documents(config)
    elif config.format == "hf":
        for number, row in enumerate(_hugging_face_rows(config)):
            yield from _from_row(row, config, f"{config.path} row {number}", f"{config.path}/{number}")
    else:
        for file in files.expand(config.path, config.name):
            kind = config.format if config.format != "auto" else files.kind_of(file)
            if kind == "text":
                for number, text in enumerate(files.read_text_pieces(file)):
                    yield Document(f"{file.name}/{number}", text, config.name)
                continue
            for number, row in enumerate(files.read_rows(file, kind), 1):
                yield from _from_row(row, config, f"{file}: row {number}", f"{file.name}/{number}")


def _hugging_face_rows(config: SourceConfig) -> Iterator[dict[str, Any]]:
    """Rows of a data set on the Hugging Face hub (or a local folder of that form), streamed."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"source {config.name}: needs the package `datasets`; pip install pocketforge[hub]") from error
    try:
        yield from datasets.load_dataset(
            config.path, config.subset or None, split=config.split, streaming=True, revision=config.revision or None
        )
    except Exception as error:  # the library and its transports raise many types; all mean that it cannot be read
        line = str(error).strip().split("\n")[0]
        raise DataError(
            f"source {config.name}: cannot stream {config.path} ({type(error).__name__}: {line}); check the id, the "
            "network, and for a gated set that you are logged in"
        ) from error


def _from_row(row: dict[str, Any], config: SourceConfig, where: str, fallback_id: str) -> Iterator[Document]:
    """The document of one row; rows with empty text are passed over."""
    name = str(row.get("id", fallback_id))
    if "messages" in row and not config.template:
        messages = with_tools(row, where)
        yield Document(name, "\n\n".join(message["content"] for message in messages), config.name, messages)
        return
    text = row_text(row, config, where)
    if text.strip():
        yield Document(name, text, config.name)


def with_tools(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Checked messages of a row; the schemas under `tools`, if any, become a system message at the front."""
    messages = row["messages"]
    check_messages(messages, where)
    cleaned = [dict(message, content=files.valid_text(message["content"])) for message in messages]
    tools = row.get("tools")
    if tools and tools != "[]":
        listing = tools if isinstance(tools, str) else json.dumps(tools)
        cleaned.insert(0, {"role": "system", "content": f"You may call these functions:\n{listing}"})
    return cleaned


def row_text(row: dict[str, Any], config: SourceConfig, where: str) -> str:
    """Text of a row: by the template, else its text field, else the schema of multiple choice with its right answer."""
    if config.template:
        try:
            return files.valid_text(config.template.format_map(row))
        except (KeyError, IndexError, ValueError) as error:
            fields = ", ".join(map(str, row))
            raise DataError(f"{where}: template {config.template!r} needs {error}; the row has {fields}") from error
    text = row.get(config.text_field)
    if isinstance(text, str):
        return files.valid_text(text)
    if text is None and isinstance(row.get("choices"), list) and "answer_index" in row:
        from data_pipeline.tasks import choice_item, choice_text

        return files.valid_text(choice_text(choice_item(row, where)))
    fields = ", ".join(map(str, row))
    raise DataError(
        f"{where}: no text under `{config.text_field}`; the row has {fields}; set text_field or template of source "
        f"{config.name}"
    )
