"""Where text comes from and in which proportions, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

# Bounds are checked where a recipe is read (launch/config.py). The upper one keeps products of counts within 64 bits.
Positive = Annotated[int, Ge(1), Le(2**31 - 1)]
Bytes = Annotated[int, Ge(1), Le(2**62)]
Name = Annotated[str, MinLen(1)]
SourceFormat = Literal["auto", "text", "jsonl", "parquet", "hf", "python_docs", "python_qa"]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents (`text`) or conversations (`messages`)."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Name
    path: str = ""
    """File, folder or glob; `$POCKETFORGE_DATA/...` is expanded. Hugging Face id for `hf`; empty for embedded text."""
    format: SourceFormat = "auto"
    """`auto` goes by the file's ending. `python_docs` and `python_qa` are found in the installed Python."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the sequences; normalised over the sources of a stage."""
    subset: str = ""
    """Configuration of a Hugging Face data set. For `python_docs`: `code`, `prose` (documentation), empty for both."""
    revision: str = ""
    """Branch, tag or commit of a Hugging Face data set; empty takes its newest."""
    split: str = "train"
    text_field: str = "text"
    template: str = ""
    """`str.format` template over a row's fields, used in place of `text_field` (e.g. "{question}\\n{solution}")."""
    max_bytes: Bytes | None = None
    """Read at most this much text (UTF-8 bytes), in file order after a seeded choice of documents; None reads all."""
    max_passes: Annotated[float, Gt(0)] = 50.0
    """Refuse a plan that repeats the source more often than this."""
    license: str = ""
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """A held-out set: documents (bits per byte) or conversations (loss on assistant tokens)."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Name
    kind: Literal["text", "chat"] = "text"
    sources: tuple[str, ...] = ()
    """Names of training sources. Their held-out part (chosen by a hash of the document, never trained on) is scored."""
    max_documents: Positive = 64
    max_document_bytes: Bytes | None = None
    """Score only the first part of longer documents (UTF-8 bytes); None scores them whole."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A byte-level BPE trained on the first stage's sources, or any `tokenizer.json`."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    path: str = ""
    """An existing tokenizer.json (or a folder with one); empty trains a new one."""
    vocab_size: Positive = 4096
    train_bytes: Bytes = 8_000_000
    """Text read to train it, in UTF-8 bytes, drawn from the sources by weight."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What one stage reads."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    sources: Annotated[tuple[SourceConfig, ...], MinLen(1)]
    kind: Literal["text", "chat"] = "text"
    packing: Literal["best_fit", "concat"] = "best_fit"
    """`best_fit` keeps documents whole where they fit; `concat` cuts the concatenation (parity with MobileLLM-R1)."""
    held_out_fraction: Annotated[float, Ge(0), Lt(1)] = 0.01
    """Share of each source's documents kept out of training, by a hash of the document."""
