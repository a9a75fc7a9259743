"""A small corpus, a tokenizer trained on it, and the folder of shared sets where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus_files import sentences, write_rows

from data_pipeline.config import SourceConfig
from data_pipeline.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([sentences(200, 0)], 330)


@pytest.fixture
def text_source(tmp_path: Path) -> Callable[..., SourceConfig]:
    """Makes a JSON Lines source of `count` documents of different lengths."""

    def make(name: str, count: int = 40, seed: int = 1, **fields: Any) -> SourceConfig:
        texts = [f"{name} {i} " + sentences(1 + i % 7, seed + i) for i in range(count)]
        file = write_rows(tmp_path / f"{name}.jsonl", [{"id": f"{name}{i}", "text": t} for i, t in enumerate(texts)])
        return SourceConfig(name=name, path=str(file), **fields)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = os.environ.get("POCKETFORGE_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("POCKETFORGE_DATA names no folder of real sets")
    return Path(folder)
