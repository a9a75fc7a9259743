"""The run directory: made once, resumed or refused, never overwritten."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from launch.cli import is_ours
from launch.config import Recipe, from_dict, read_toml, save_toml, to_dict
from stages.config import STAGES
from stages.errors import InputError, RunError

logger = logging.getLogger(__name__)

# What may differ between a run and its resumption: none of it changes what a step computes.
FREE = ("launch", "checkpoint", "tracking", "evaluation", "train.log_every", "train.steps", "train.eval_every",
        "parallel.timeout_seconds")


@contextmanager
def open_run(recipe: Recipe, directory: Path, *, resume: bool) -> Iterator[Path]:
    """Hold `directory` for this run. Raises InputError where another run, or another process, has it.

    Under torchrun the first process holds it for all. A new run whose input is refused before it trained anything
    leaves no claim, so that the corrected command finds the directory as this one did.
    """
    if os.environ.get("RANK", "0") != "0":
        yield directory
        return
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--output-dir {directory} is a file; name a folder")
    saved = directory / "recipe.toml"
    if saved.is_file():
        if not resume:
            raise InputError(f"{directory} already holds a run; add --resume to go on with it, or name another --output-dir")
        if change := first_difference(from_dict(read_toml(saved), str(saved)), recipe):
            raise InputError(f"{directory} holds a run of another recipe ({change}); "
                             "resume it with its own recipe.toml, or name another --output-dir")
    elif directory.is_dir() and any(directory.iterdir()) and not _only_ours(directory):
        raise InputError(f"{directory} is not empty and holds no run (no recipe.toml); name another --output-dir")
    is_new = not saved.is_file()
    made = missing_folders(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {directory} cannot be made ({error.strerror}); name a folder you may write") from None
    try:
        with FileLock(directory / ".lock", timeout=0):
            save_toml(recipe, saved)
            try:
                yield directory
            except ValueError as error:
                if is_new and is_ours(error) and not _has_trained(directory):
                    _give_up(directory, made)
                raise
    except Timeout:
        raise InputError(f"{directory} is in use by another process; wait for it, or name another --output-dir") from None


def missing_folders(path: Path) -> list[Path]:
    """`path` and its parents as far as they do not exist, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Take away what was made for nothing; a folder that holds something by now stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _has_trained(directory: Path) -> bool:
    logged = any(path.stat().st_size for path in directory.glob("*/metrics.jsonl"))
    return logged or any(directory.glob("*/checkpoints/step-*/commit.json"))


def _give_up(directory: Path, made: list[Path]) -> None:
    """Remove what a refused start left in its new directory. Called with the lock held, so nobody else is in it.

    Prepared data stays where there is any: it is keyed by its content, and the next start is let in beside it.
    """
    for name in (*STAGES, "ray"):
        shutil.rmtree(directory / name, ignore_errors=True)
    data = directory / "data"
    if not any(path.is_file() and not path.name.startswith(".") for path in data.rglob("*")):
        shutil.rmtree(data, ignore_errors=True)
    for name in ("recipe.toml", ".lock"):
        (directory / name).unlink(missing_ok=True)
    remove_empty(made)


def _only_ours(directory: Path) -> bool:
    return all(entry.name in {".lock", "data"} for entry in directory.iterdir())


def first_difference(before: Recipe, after: Recipe) -> str | None:
    """The first key that makes the two runs different, as `key: before -> after`, or None."""

    def flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flatten(item, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, value

    old, new = dict(flatten(to_dict(before), "")), dict(flatten(to_dict(after), ""))
    for key in dict.fromkeys([*old, *new]):
        if not any(key == free or key.startswith(free + ".") for free in FREE) and old.get(key) != new.get(key):
            return f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}"
    return None


def check_output(path: Path, option: str = "--output") -> None:
    """Raises InputError where what an option names is taken or cannot be written, before any work is done for it."""
    made: list[Path] = []
    try:
        if path.exists() or path.is_symlink():
            raise InputError(f"{option} {path} exists; name another, nothing is overwritten")
        part_of(path).exists()  # a name with no room for what is added while it is written
        made = missing_folders(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written ({error.strerror}); name a place that you may write") from None
    finally:
        remove_empty(made)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: a full disk is told in one line, and folders made for a file that failed go again."""
    made = missing_folders(path.parent)
    try:
        yield
    except Exception as error:
        from stages.checkpoint_files import error_number

        if (number := error_number(error)) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f"{path} was not written ({os.strerror(number)}); free some space, or name another place") from None
    finally:
        remove_empty(made)


def part_of(path: Path) -> Path:
    """The hidden name under which a file, or an export, is written until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A hidden name in the folder of `path`, made if need be, that becomes `path` at the end, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is missing or damaged, for files that can be made again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: written beside, then renamed."""
    with writing(path), beside(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
