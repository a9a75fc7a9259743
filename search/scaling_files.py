"""Laws and their runs on disk: JSON, and JSON Lines. Read as untrusted input: the first thing wrong is told in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from search.scaling_law import Choice, Constants, LawError, Part, ScalingLaw

MOST_BYTES = 64_000_000
_NAMES = tuple(item.name for item in fields(Constants))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training: what a law is fitted to."""

    active: float
    """Parameters that take part in a token, embedding included."""
    active_without_embedding: float | None = None
    total: float | None = None
    """All parameters."""
    tokens: float
    """Trained on, repeats included."""
    experts: float = 1
    """E: how many times more experts there are than a token uses; 1 is dense."""
    granularity: int = 1
    shared: bool = False
    loss: float
    """Held-out, in nats a token."""
    bits_per_byte: float | None = None
    vocab_size: int | None = None
    """Of the tokenizer whose tokens the loss counts."""
    name: str = ""

    def __post_init__(self) -> None:
        numbers: dict[str, tuple[Any, float]] = {"active": (self.active, 1), "tokens": (self.tokens, 1),
                                                 "experts": (self.experts, 1), "granularity": (self.granularity, 1),
                                                 "loss": (self.loss, 0)}  # fmt: skip
        for name in ("active_without_embedding", "total", "bits_per_byte", "vocab_size"):
            if getattr(self, name) is not None:
                numbers[name] = getattr(self, name), 0
        for name, (value, least) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
                raise LawError(f"{name} is {value!r}; expected a finite number of at least {least:g}")
        if self.loss == 0 or not isinstance(self.shared, bool) or self.granularity != int(self.granularity):
            raise LawError(f"loss {self.loss!r}, shared {self.shared!r}, granularity {self.granularity!r}; expected a loss "
                           "above 0, true or false, and a whole number")  # fmt: skip
        _ = self.choice

    @property
    def choice(self) -> Choice | None:
        """x of the law; None for a dense model, which counts as every x."""
        return None if self.experts == 1 else Choice(int(self.granularity), self.shared)

    def size(self, with_embedding: bool) -> float:
        """Active parameters as a law counts them. Raises LawError where that was not recorded."""
        if with_embedding:
            return self.active
        if not self.active_without_embedding:
            raise LawError(f"run {self.name or '?'} has no active_without_embedding; fit it with the embedding")
        return self.active_without_embedding


def read_runs(path: Path) -> list[Run]:
    """Of a JSON Lines file, or of every `runs.jsonl` in a folder. Raises LawError that names the line."""
    if path.is_dir():
        files = sorted(path.rglob("runs.jsonl"))
        if not files:
            raise LawError(f"{path} has no runs.jsonl; expected a file, or a folder that a ladder was trained in")
    else:
        files = [path]
    runs = [run for file in files for run in _runs_of(file)]
    if not runs:
        raise LawError(f"{path} holds no runs; expected one JSON object a line")
    return runs


def _runs_of(path: Path) -> Iterable[Run]:
    known = {item.name for item in fields(Run)}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise LawError(f"{path}, line {number}: not JSON") from None
        if not isinstance(values, dict):
            raise LawError(f"{path}, line {number}: expected an object with active, tokens, loss")
        if missing := [name for name in ("active", "tokens", "loss") if name not in values]:
            raise LawError(f"{path}, line {number}: {missing[0]} is missing")
        try:
            yield Run(**{name: value for name, value in values.items() if name in known})
        except LawError as error:
            raise LawError(f"{path}, line {number}: {error}") from None


def runs_text(runs: Iterable[Run]) -> str:
    """JSON Lines that `read_runs` reads."""
    return "".join(json.dumps({k: v for k, v in asdict(run).items() if v is not None}) + "\n" for run in runs)


def law_to_dict(law: ScalingLaw) -> dict[str, Any]:
    return {
        "units": "billions of active parameters and of tokens; nats a token", "provenance": law.provenance,
        "counts_embedding": law.counts_embedding, "E_start": law.start, "E_max": law.most,
        "common": _part_to_dict(law.common),
        "choices": {str(choice): _part_to_dict(part) for choice, part in law.parts.items()},
    }  # fmt: skip


def _part_to_dict(part: Part) -> dict[str, Any]:
    values = {name: getattr(part, name) for name in ("active", "tokens", "experts", "rmse", "noise", "runs")}
    return {"constants": asdict(part.constants), **values,
            "intervals": part.intervals(), "draws": [astuple(draw) for draw in part.draws]}  # fmt: skip


def read_law(path: Path) -> ScalingLaw:
    """From the JSON of `law_to_dict`. Raises LawError."""
    try:
        values = json.loads(_text(path))
        parts = {Choice.parse(name): _part(part) for name, part in values.get("choices", {}).items()}
        return ScalingLaw(common=_part(values["common"]), parts=parts, provenance=str(values["provenance"]),
                          counts_embedding=bool(values["counts_embedding"]), start=_number(values["E_start"]),
                          most=_number(values["E_max"]))  # fmt: skip
    except LawError:
        raise
    except KeyError as error:
        raise LawError(f"{path}: {error.args[0]} is missing; expected a law that `launch/scaling_law.py fit` wrote") from None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        raise LawError(f"{path}: no scaling law; expected the JSON that `launch/scaling_law.py fit` wrote") from None


def _part(values: Mapping[str, Any]) -> Part:
    constants = {name: _number(values["constants"][name]) for name in _NAMES}
    draws = (dict(zip(_NAMES, map(_number, draw), strict=True)) for draw in values["draws"])
    return Part(constants=_positive(constants), **{name: _pair(values[name]) for name in ("active", "tokens", "experts")},
                rmse=_number(values["rmse"]), noise=_number(values["noise"]), runs=int(values["runs"]),
                draws=tuple(map(_positive, draws)))  # fmt: skip


def _positive(values: Mapping[str, float]) -> Constants:
    if min(values["A"], values["B"], values["c"]) < 0:
        raise ValueError
    return Constants(**values)


def _pair(value: Any) -> tuple[float, float]:
    low, high = map(_number, value)
    return low, high


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise LawError(f"{path} has more than {MOST_BYTES:,} bytes; that is no list of runs and no law")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise LawError(f"{path} cannot be read ({reason})") from None
