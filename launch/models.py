"""A model named on the command line: a run, a checkpoint, a Hugging Face folder, or a packed file for the runtime."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kernels.packed_file import is_packed
from stages.errors import InputError

if TYPE_CHECKING:
    from stages.scoring import Scorer


def add_runtime_options(parser: argparse.ArgumentParser) -> None:
    """`--threads` and `--kv`: how a packed file is run. Other models take no notice of them."""
    parser.add_argument("--threads", type=int, default=1, help="of a packed file's runtime (default 1)")
    parser.add_argument("--kv", choices=["f32", "f16", "int8"], default="f32", help="its key/value cache (default f32)")


def load_scorer(path: Path, options: argparse.Namespace) -> Scorer:
    """What evaluation needs of a model."""
    if is_packed(path):
        from stages.packed import load_packed

        return load_packed(path, kv=options.kv, threads=_threads(options))
    from stages.loading import load_model

    return load_model(path)


def load_generator(path: Path, options: argparse.Namespace) -> tuple[Scorer, Callable[..., Iterator[int]]]:
    """A model, and the function that continues token ids with it."""
    if is_packed(path):
        from stages.packed import generate_packed, load_packed

        packed = load_packed(path, kv=options.kv, threads=_threads(options))
        return packed, partial(generate_packed, packed)
    from modeling.generate import generate
    from stages.loading import load_model

    loaded = load_model(path)
    return loaded, partial(generate, loaded.model)


def _threads(options: argparse.Namespace) -> int:
    if not 1 <= options.threads <= 256:
        raise InputError(f"--threads {options.threads}; expected 1 to 256")
    return int(options.threads)
