"""Text that lies on every machine with Python: the standard library's sources and documentation.

Found at run time in the running interpreter and never copied. Modules are read as text and parsed, not imported, except
those built into the interpreter itself, which have no source.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.sources import Document

# Tests, vendored wheels and tables of code points: much text, little to learn from.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__",
            "encodings", "ensurepip", "pydoc_data", "idle_test"}  # fmt: skip
_BUILT_IN = ("builtins", "math", "cmath", "itertools", "time", "sys", "gc", "array", "zlib", "errno", "unicodedata",
             "_collections", "_functools", "_operator", "_io", "_struct", "_random", "_heapq", "_bisect")  # fmt: skip
_LEAST_ANSWER, _MOST_ANSWER = 20, 700
"""Characters: shorter documentation says nothing, longer is cut after a paragraph."""

_QUESTIONS = (
    "What does the Python {kind} `{name}` do?",
    "Explain `{name}` from Python's standard library.",
    "How is `{name}` documented in Python?",
    "What is `{name}` for?",
    "Describe the {kind} `{name}`.",
)


@dataclass(frozen=True)
class Entry:
    """One documented name: `json.dumps`, a function, its arguments as written, its documentation."""

    name: str
    kind: str
    signature: str
    doc: str


def library_root() -> Path:
    """The folder of the running interpreter's standard library. DataError where it has none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "json" / "__init__.py").is_file():
        raise DataError(f"python_docs: no standard library with sources at {root}; give sources of your own")
    return root


@functools.cache
def source_files() -> tuple[tuple[str, Path], ...]:
    """(module name, file) of the library's modules, in order of the name."""
    root = library_root()
    found = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and not any(part.startswith("config-") for part in parts):
            found.append((".".join(part for part in parts if part != "__init__"), file))
    return tuple(sorted(found))


def content_key() -> str:
    """Changes when the embedded text does: interpreter version, and every file's name and size."""
    listing = [f"{name}:{file.stat().st_size}" for name, file in source_files()]
    listing.append(f"{platform.python_implementation()} {sys.version}")
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def documents(config: SourceConfig) -> Iterator[Document]:
    """Documents of format `python_docs` (subset `code`, `prose`, or both) or conversations of `python_qa`."""
    if config.format == "python_qa":
        yield from _conversations(config.name)
        return
    if config.subset not in ("", "code", "prose"):
        raise DataError(f"source {config.name}: subset={config.subset!r}; expected `code`, `prose` or nothing for both")
    for module, text, entries in _modules():
        if config.subset != "prose" and text.strip():
            yield Document(f"code/{module}", text, config.name)
        if config.subset != "code" and entries:
            yield Document(f"prose/{module}", _manual_page(module, entries), config.name)
    if config.subset != "code":
        for name, text in _topics():
            yield Document(f"topic/{name}", text, config.name)


@functools.cache
def _modules() -> tuple[tuple[str, str, tuple[Entry, ...]], ...]:
    """(module, source text, documented names) of the whole library; parsed once a process."""
    found = []
    for module, file in source_files():
        try:
            text = file.read_text("utf-8")
            tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue  # the library ships a few files that are deliberately not UTF-8 or not valid Python
        found.append((module, text, tuple(_entries(module, tree))))
    for module in _BUILT_IN:
        found.append((module, "", tuple(_built_in_entries(module))))
    return tuple(found)


def _entries(module: str, tree: ast.Module) -> Iterator[Entry]:
    doc = ast.get_docstring(tree)
    if doc:
        yield Entry(module, "module", "", doc)
    for node in tree.body:
        yield from _node_entries(module, node)


def _node_entries(prefix: str, node: ast.AST) -> Iterator[Entry]:
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or node.name.startswith("_"):
        return
    name = f"{prefix}.{node.name}"
    doc = ast.get_docstring(node)
    if isinstance(node, ast.ClassDef):
        if doc:
            yield Entry(name, "class", "", doc)
        for child in node.body:
            yield from _node_entries(name, child)
    elif doc:
        yield Entry(name, "function", f"({ast.unparse(node.args)})", doc)


def _built_in_entries(name: str) -> Iterator[Entry]:
    try:
        module = importlib.import_module(name)
    except ImportError:
        return  # which of these are there depends on how the interpreter was built
    shown = "" if name == "builtins" else name.lstrip("_") + "."
    for key in sorted(vars(module)):
        value = getattr(module, key)
        if key.startswith("_") or not callable(value) or not isinstance(value.__doc__, str):
            continue
        kind = "class" if isinstance(value, type) else "function"
        signature = getattr(value, "__text_signature__", None) or ""
        yield Entry(shown + key, kind, signature, inspect.cleandoc(value.__doc__))


def _topics() -> Iterator[tuple[str, str]]:
    """Chapters of the language reference, as `help()` shows them; a literal in the library, read without running it."""
    file = library_root() / "pydoc_data" / "topics.py"
    if not file.is_file():
        return
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from sorted(ast.literal_eval(node.value).items())


def _manual_page(module: str, entries: tuple[Entry, ...]) -> str:
    sections = [f"{entry.kind} {entry.name}{entry.signature}\n\n{entry.doc}" for entry in entries]
    return f"Python module {module}\n\n" + "\n\n\n".join(sections) + "\n"


def _conversations(source: str) -> Iterator[Document]:
    """A user asks about a documented name, the assistant answers with its documentation."""
    seen: set[str] = set()
    for _, _, entries in _modules():
        for entry in entries:
            answer = _answer(entry.doc)
            if len(answer) < _LEAST_ANSWER or entry.name in seen or answer in seen:
                continue
            seen.update((entry.name, answer))
            pick = int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[:4], "little")
            question = _QUESTIONS[pick % len(_QUESTIONS)].format(kind=entry.kind, name=entry.name)
            if entry.signature:
                answer = f"`{entry.name}{entry.signature}`\n\n{answer}"
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield Document(f"qa/{entry.name}", f"{question}\n\n{answer}", source, messages)


def _answer(doc: str) -> str:
    """Whole paragraphs from the start of the documentation, as many as fit."""
    answer = ""
    for paragraph in doc.strip().split("\n\n"):
        longer = f"{answer}\n\n{paragraph}".strip("\n")
        if len(longer) > _MOST_ANSWER:
            break
        answer = longer
    return answer.rstrip()
