"""A search as data: what may be varied, on which device, within what limits, how each candidate is trained.

Read and validated as a recipe is (launch/config.py); a dotted override names a key of it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import TypeAdapter, ValidationError

from launch.config import Recipe, first_problem, plain, read_toml
from launch.overrides import apply_overrides
from search.candidate import check_tables
from search.experts import rule_of
from search.metrics import Point, metrics_at
from search.optim.catalog import Kind
from search.space import Space
from stages.config import Positive, StageName
from stages.errors import InputError

Milliseconds = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class PointConfig:
    """Another way to run the models that are measured."""

    __pydantic_config__ = {"extra": "forbid"}

    prompt_tokens: Positive
    threads: Positive = 1


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """What is measured, and where."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    names: Annotated[tuple[str, ...], MinLen(1)] = ("local",)
    """As `launch/measure.py --device` takes them, or agent://HOST:PORT; several are one class and share the work."""
    prompt_tokens: Positive = 2048
    decode_tokens: Positive = 16
    threads: Positive = 1
    also: tuple[PointConfig, ...] = ()
    """Every model is measured there too: more latency models, and limits such as `goal.limits."ttft_ms@512x2"`."""
    kv: Literal["f32", "f16", "int8"] = "int8"
    timeout_s: Annotated[float, Gt(0)] = 600.0
    readings: Annotated[int, Ge(10)] = 60
    """Bought at first, for the latency model."""
    more: Positive = 20
    max_readings: Positive = 400
    min_repeats: Positive = 5
    max_repeats: Positive = 30
    warmup: Annotated[int, Ge(0), Le(100)] = 4
    processor_time: bool = False
    """For a computer that does other work too: times are processor time, of one thread."""
    sentinel_jobs: Annotated[int, Ge(0)] = 20
    """So many measurements after one of the same model that shows drift; 0 for none."""
    drift: Annotated[float, Gt(0)] = 0.05
    """How far off its first time that model may be, as a share."""
    cool_s: Annotated[float, Ge(0)] = 120.0
    """Pause of a device that is found to have drifted."""
    max_c: Annotated[float, Ge(0), Le(120)] = 0.0
    """Degrees Celsius that a device must have cooled down to before it is timed; 0 for any. Phones: 37."""
    max_wait_s: Annotated[float, Ge(0)] = 600.0
    """The longest wait for that."""
    rest_s: Annotated[float, Ge(0)] = 0.0
    """Pause after each measurement."""
    reboot: bool = False
    """Reboot a phone that does not come back by itself (adb)."""

    def __post_init__(self) -> None:
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names={list(self.names)} has a device twice; name each once")
        for least, most in (("readings", "max_readings"), ("min_repeats", "max_repeats")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least}={getattr(self, least)} is more than {most}={getattr(self, most)}; lower it")
        if self.processor_time and max(self.threads, *(point.threads for point in self.also), 1) > 1:
            raise ValueError("processor_time says nothing of how long several threads take together; leave it out, or measure "
                             "with 1 thread")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GoalConfig:
    """What is good enough to be of use."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    ttft_ms: Milliseconds
    """Time to the first token: the limit."""
    loss: Annotated[float, Gt(0)]
    """Held-out loss that is just no longer of use, in nats a token."""
    limits: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)
    """The largest allowed of other numbers of the device, such as `decode_ms` or `peak_memory_mib` (search/metrics.py)."""
    objectives: tuple[str, ...] = ("loss", "ttft_ms")
    """What is made small, `loss` first; others must have a limit."""

    def __post_init__(self) -> None:
        if self.objectives[:1] != ("loss",) or len(set(self.objectives)) < max(2, len(self.objectives)):
            raise ValueError(f"objectives {list(self.objectives)}; expected loss first and at least one number of the device, "
                             "each once")  # fmt: skip
        if "ttft_ms" in self.limits:
            raise ValueError("limits has ttft_ms; its limit is goal.ttft_ms")
        if missing := [name for name in self.objectives[1:] if name != "ttft_ms" and name not in self.limits]:
            raise ValueError(f"objectives has {missing[0]}, which has no limit; set goal.limits.{missing[0]} to a value that "
                             "is just no longer of use")

    def device_limits(self) -> dict[str, float]:
        """By name, of everything that is measured and bounded."""
        return {"ttft_ms": self.ttft_ms, **self.limits}


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """How a candidate gets its quality: made, trained briefly, scored on held-out text."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    source: Literal["pruned", "supernet", "scratch"] = "pruned"
    """`supernet`: one set of shared weights is trained on all architectures first, and each is scored with it as it is.
    `scratch`: each is trained from random weights, also mixtures of experts."""
    routing: Literal["layer", "neuron", "plain"] = "layer"
    """How a supernet mixes its experts by architecture; `plain` has none."""
    supernet_steps: Positive = 1000
    backbone: str = ""
    """Run or checkpoint; empty trains the recipe's pre-training stage first, in the sweep's directory."""
    budget_tokens: Annotated[int, Ge(1), Le(10**15)]
    """Of one candidate's short training."""
    short_tokens: Annotated[int, Ge(0), Le(10**15)] = 0
    """Above 0: a shorter training first; the full one only where that leaves a chance of a better front (docs/search.md)."""
    calibration_sequences: Positive = 64
    variant: Literal["wanda", "energy", "magnitude", "taylor", "weights", "random"] = "wanda"
    layers: Literal["cosine", "loss"] = "cosine"
    held_out: str = ""
    processes: Annotated[int, Ge(1), Le(256)] = 1
    """Candidates that are scored at once, each in a process of this machine (or a Ray job, where the recipe has workers)."""


@dataclass(frozen=True, kw_only=True)
class SweepRecipe:
    """Everything about a search."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}

    name: Annotated[str, MinLen(1)]
    recipe: Recipe
    """Data, optimizer and stages; its model is the backbone, the largest candidate."""
    space: dict[str, Any]
    """Lists of choices (`search.space.Space.from_dict`); what is the same for all is taken from the recipe's model."""
    goal: GoalConfig
    quality: QualityConfig
    device: DeviceConfig = field(default_factory=DeviceConfig)
    trials: Annotated[int, Ge(1), Le(100_000)] = 200
    batch: Positive = 8
    confirm: Positive = 8
    retrain: Annotated[int, Ge(0)] = 0
    """So many models of the front are trained through all stages of the recipe at the end, packed and measured."""
    retrain_steps: dict[StageName, Positive] = field(default_factory=dict)
    """In place of the recipe's, in what is exported: a picked model inherits its weights and may need less."""
    seed: Annotated[int, Ge(0)] = 0
    optimizer: Kind = "staged"
    """`staged` knows the latency model and asks for little; the others (docs/search.md) are for comparison."""

    def __post_init__(self) -> None:
        space = self.make_space()
        check_source(self.quality, self.recipe, space)
        model = self.recipe.model
        cut = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads")
        for name in cut if self.quality.source != "scratch" else ():
            largest, has = max(space.choices[name]), getattr(model, name)
            if name == "num_layers":
                has *= model.block_repeat
            if largest > has:
                raise ValueError(f"space.{name} goes up to {largest}, the backbone has {has}: it cannot be cut from it; "
                                 "take smaller choices or a larger recipe.model")  # fmt: skip
        if unknown := [name for name in self.retrain_steps if name not in self.recipe.stages()]:
            raise ValueError(f"retrain_steps has {unknown[0]}; the recipe has {', '.join(self.recipe.stages())}")
        measured = [metric.name for metric in metrics_at(self.points(), self.main)]
        if strange := [name for name in self.goal.device_limits() if name not in measured]:
            raise ValueError(f"goal has {strange[0]}, which is not measured; measured are {', '.join(measured)} (device.also "
                             "adds prompt lengths and threads)")  # fmt: skip
        short, budget = self.quality.short_tokens, self.quality.budget_tokens
        if short >= budget:
            raise ValueError(f"quality.short_tokens {short} is no shorter than quality.budget_tokens {budget}; take fewer, or "
                             "0 for one budget")  # fmt: skip
        if short and self.optimizer != "staged":
            raise ValueError(f"quality.short_tokens {short} with optimizer {self.optimizer}, which would take a predicted loss "
                             "for a measured one; take optimizer staged, or short_tokens 0")  # fmt: skip
        if short and self.quality.source == "supernet":
            raise ValueError(f"quality.short_tokens {short} with quality.source supernet, which trains no candidate; take 0")

    @property
    def main(self) -> Point:
        return Point(self.device.prompt_tokens, self.device.threads)

    def points(self) -> tuple[Point, ...]:
        return (self.main, *(Point(point.prompt_tokens, point.threads) for point in self.device.also))

    def make_space(self) -> Space:
        """Raises ValueError that names the entry."""
        model = self.recipe.model
        shared = ("vocab_size", "max_positions", "rope_theta", "norm_eps", "init_std", "tie_embeddings", "qk_norm", "window")
        check_tables(self.space)
        rule = {} if model.moe is None else {"moe": rule_of(model.moe)}
        fixed = {name: getattr(model, name) for name in shared} | rule | dict(self.space.get("fixed", {}))
        if fixed["vocab_size"] != model.vocab_size:
            raise ValueError(f"space.fixed.vocab_size={fixed['vocab_size']!r}, the backbone has {model.vocab_size}; omit it")
        limits = {"context": self.device.prompt_tokens, "kv_bits": {"f32": 32, "f16": 16, "int8": 8}[self.device.kv]}
        return Space.from_dict({"head_dim": [model.head_dim], **self.space, "fixed": fixed,
                                "limits": limits | dict(self.space.get("limits", {}))})  # fmt: skip

    def comparable(self) -> dict[str, Any]:
        """What two sweeps must share for their trials to be comparable; the number of trials may grow."""
        everything = to_dict(self)
        for free in ("trials", "confirm", "batch", "retrain", "retrain_steps"):
            everything.pop(free)
        everything["quality"].pop("processes", None)
        for free in ("launch", "tracking", "evaluation"):
            everything["recipe"].pop(free, None)
        return everything


def check_source(quality: QualityConfig, recipe: Recipe, space: Space) -> None:
    """Raises ValueError for a source of quality that the space, or the recipe, cannot have."""
    source = quality.source
    if source != "pruned" and (quality.backbone or recipe.pretrain is None):
        raise ValueError(f"quality.source {source} trains its own weights on the recipe's pretrain stage; leave "
                         "quality.backbone empty and give the recipe that stage")  # fmt: skip
    if source != "scratch" and space.has_experts:
        raise ValueError(f"space.experts {list(space.choices['experts'])} with quality.source {source}: a mixture is "
                         "not cut from a dense backbone; take quality.source scratch, or experts [1]")  # fmt: skip
    if source != "scratch" and recipe.model.moe is not None:
        raise ValueError(f"recipe.model has experts, and quality.source {source} cuts candidates from it: only dense "
                         "models are cut; take quality.source scratch, or a dense model")  # fmt: skip


@cache
def _adapter() -> TypeAdapter[SweepRecipe]:
    return TypeAdapter(SweepRecipe)


def to_dict(sweep: SweepRecipe) -> dict[str, Any]:
    return plain(dataclasses.asdict(sweep))


def from_dict(values: Mapping[str, Any], where: str) -> SweepRecipe:
    """Validate; the first thing wrong becomes one line that starts with `where`."""
    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error)}") from None


def load_sweep(name_or_file: str, overrides: Mapping[str, str], devices: list[str] | None = None) -> SweepRecipe:
    """A search by name (`launch/sweeps/`) or from a TOML file, with overrides; `devices` replace its own."""
    from launch.sweeps import SWEEPS

    path = Path(name_or_file)
    if name_or_file in SWEEPS:
        values, where = to_dict(SWEEPS[name_or_file]()), f"sweep {name_or_file}"
    elif path.suffix == ".toml" or path.is_file():
        values, where = read_toml(path), str(path)
        from_dict(values, where)
    else:
        close = difflib.get_close_matches(name_or_file, SWEEPS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(SWEEPS)}"
        raise InputError(f"no sweep named {name_or_file!r} and no such file; {hint}")
    if devices:
        values.setdefault("device", {})["names"] = devices
    return from_dict(apply_overrides(values, overrides), "override" if overrides else where)


def save_sweep(sweep: SweepRecipe, path: Path) -> None:
    path.write_text(tomli_w.dumps(to_dict(sweep)), encoding="utf-8")
