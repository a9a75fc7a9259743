"""The recipe: a typed, frozen tree that says everything about a run, its TOML form, and dotted overrides.

Validation is pydantic's over the plain dataclasses of each folder, so an unknown key or a wrong type is found before
anything starts. The order is: recipe function or file -> dictionary -> overrides -> validated `Recipe`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from annotated_types import Ge, Le, MinLen
from pydantic import TypeAdapter, ValidationError

from data_pipeline.config import HeldOutConfig, SourceConfig, TokenizerConfig
from launch.overrides import apply_overrides
from launch.recipe_checks import check_recipe
from modeling.config import ModelConfig
from stages.config import (
    STAGES,
    CheckpointConfig,
    Natural,
    ParallelConfig,
    Positive,
    StageConfig,
    StageName,
    TrainConfig,
)
from stages.errors import InputError

Resource = Annotated[float, Ge(0), Le(1e6)]
"""CPUs or GPUs; Ray takes parts of one."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Where the workers run."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    runner: Literal["auto", "ray", "local"] = "auto"
    """`ray` uses Ray Train; `local` this process (or torchrun's); `auto` is local for one worker outside a Ray job."""
    workers: Positive = 1
    """Training processes over all nodes."""
    cpus_per_worker: Resource = 1.0
    gpus_per_worker: Resource = 0.0
    threads_per_worker: Annotated[int, Ge(0), Le(1024)] = 0
    """Threads of one worker's tensor operations; 0 takes cpus_per_worker under Ray and torch's default alone."""
    nodes: Natural = 0
    """Spread the workers evenly over exactly this many nodes; 0 leaves the placement to Ray."""
    max_failures: Natural = 2
    """How often a lost worker group is started again from its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is scored when the last stage is done."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    tasks: tuple[str, ...] = ()
    """Task names (read from the data folder) or paths. A named task that the data folder lacks is left out, and said."""
    limit: Positive | None = None
    """Items a task; None takes all."""
    prompts: tuple[str, ...] = ()
    """Continued by every stage's model for the report."""
    max_new_tokens: Annotated[int, Ge(1), Le(2**20)] = 48


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Weights & Biases."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "pocketforge"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about a run."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Annotated[str, MinLen(1)]
    model: ModelConfig
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    pretrain: StageConfig | None = None
    midtrain: StageConfig | None = None
    sft: StageConfig | None = None
    qat: StageConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_recipe(self)

    def stages(self) -> dict[StageName, StageConfig]:
        """The stages that this recipe has, in order."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}

    def sources(self) -> list[SourceConfig]:
        return [source for stage in self.stages().values() for source in stage.data.sources]

    def held_out_sources(self, held_out: HeldOutConfig) -> tuple[SourceConfig, ...]:
        """The training sources a held-out set is cut from, each once."""
        found = {source.name: source for source in reversed(self.sources())}
        return tuple(found[name] for name in held_out.sources)

    def held_out_fraction(self) -> float:
        """The share that is held out in every stage a held-out set is cut from, so that none of it is trained on."""
        named = {name for item in self.train.held_out for name in item.sources}
        stages = self.stages().values()
        return min((stage.data.held_out_fraction for stage in stages
                    if any(source.name in named for source in stage.data.sources)), default=0.0)  # fmt: skip

    def hash(self) -> str:
        """Twelve hex digits over everything that a result depends on."""
        text = json.dumps(to_dict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries, lists and scalars; None is left out (TOML has none)."""
    return plain(dataclasses.asdict(recipe))


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def from_dict(values: Mapping[str, Any], where: str) -> Recipe:
    """Validate; the first thing wrong becomes one line that starts with `where`."""
    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    # An unknown key explains more than what follows from it, so it is told first.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "unexpected_keyword_argument")
    problem = problems[0]
    path = ".".join(str(part) for part in problem["loc"] if part != "function-after")
    match problem["type"]:
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key {path!r}{_suggest(path)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"{path} is missing; give it a value"
        case "value_error":
            return str(problem["ctx"]["error"])
        case _:
            return f"{path}={_shown(problem['input'])}: {problem['msg']}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _suggest(path: str) -> str:
    known = known_keys()
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    siblings = [key for key in known if key.rpartition(".")[0] == path.rpartition(".")[0]]
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(siblings)}" if siblings else ""


@cache
def known_keys() -> list[str]:
    """Every dotted key of a recipe, lists excepted."""

    def walk(kind: type, prefix: str) -> list[str]:
        keys = []
        hints = _hints(kind)
        for item in dataclasses.fields(kind):
            inner = next((t for t in _alternatives(hints[item.name]) if dataclasses.is_dataclass(t)), None)
            keys += walk(inner, f"{prefix}{item.name}.") if isinstance(inner, type) else [f"{prefix}{item.name}"]
        return keys

    return walk(Recipe, "")


def _hints(kind: type) -> dict[str, Any]:
    import typing

    return typing.get_type_hints(kind)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    import types
    import typing

    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def load_recipe(name_or_file: str, overrides: Mapping[str, str]) -> Recipe:
    """A recipe by name (`launch/recipes/`) or from a TOML file, with overrides."""
    from launch.recipes import RECIPES

    path = Path(name_or_file)
    if name_or_file in RECIPES:
        values, where = to_dict(RECIPES[name_or_file]()), f"recipe {name_or_file}"
    elif path.suffix == ".toml" or path.is_file():
        values, where = read_toml(path), str(path)
        from_dict(values, where)  # a fault of the file is named as the file's, before overrides
    else:
        close = difflib.get_close_matches(name_or_file, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`python launch/list.py` names them all"
        raise InputError(f"no recipe named {name_or_file!r} and no such file; {hint}")
    return from_dict(apply_overrides(values, overrides), "override" if overrides else where)


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a recipe in TOML") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not TOML ({error})") from None


def save_toml(recipe: Recipe, path: Path) -> None:
    path.write_text(tomli_w.dumps(to_dict(recipe)), encoding="utf-8")
