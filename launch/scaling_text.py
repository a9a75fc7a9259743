"""Designs and laws as tables for a terminal, and a design as a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import Recipe, plain, to_dict
from launch.page import count
from launch.rundir import beside, write_json, writing
from search.scaling_design import Design
from search.scaling_files import Run, read_law
from search.scaling_law import PUBLISHED, Constants, Part, ScalingLaw
from stages.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from search.scaling_fit import Prior

_CAPS = {"memory_bytes": "memory", "token_flops": "FLOPs a token", "train_flops": "training FLOPs"}


def prior_named(name: str, runs: Sequence[Run]) -> tuple[Prior | None, str]:
    """The prior and what to call it. `auto` takes the published one where a run lies in its range of N and D.

    Outside of it the published exponents say nothing, and some of them absurd things: at a million tokens its data term
    grows with E to a power above 3. There the prior is a weak one.
    """
    from search.scaling_fit import published_prior, weak_prior

    if name == "auto":
        part = PUBLISHED.common
        name = "published" if any(
            part.active[0] <= run.active / 1e9 <= part.active[1] and part.tokens[0] <= run.tokens / 1e9 <= part.tokens[1]
            for run in runs) else "weak"  # fmt: skip
    if name == "none":
        return None, "none"
    if name == "weak":
        return weak_prior(runs), "weak"
    if name == "published":
        return published_prior(PUBLISHED.common.constants), "published"
    return published_prior(read_law(Path(name)).common.constants), name


def print_designs(designs: Sequence[Design], law: ScalingLaw) -> None:
    """The best design of each E, the best first, and what to know about the first."""
    from rich.table import Table

    table = Table(title="designs, the best of each E")
    for heading in ("E", "experts", "layers x width", "active", "total", "tokens", "loss", "95 %", "memory", "FLOPs/token",
                    "fitted?"):
        table.add_column(heading, justify="right", no_wrap=True)
    for design in designs:
        config, said = design.config, design.prediction
        moe = config.moe
        cut = "dense" if moe is None else f"{moe.num_experts}{'+1' if moe.shared_size else ''}, top {moe.top_k}"
        table.add_row(
            str(design.experts), cut, f"{config.num_layers} x {config.hidden_size}", count(config.num_active_params()),
            count(config.num_params()), count(design.tokens), f"{said.loss:.3f}", _band(said.low, said.high),
            gigabytes(design.costs["memory_bytes"]), f"{design.costs['token_flops']:.3g}",
            "outside" if said.warnings else "yes",
        )  # fmt: skip
    _print(table)
    for line in notes(designs[0], law):
        sys.stdout.write(line + "\n")


def gigabytes(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _band(low: float | None, high: float | None) -> str:
    return "unknown" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def notes(best: Design, law: ScalingLaw) -> list[str]:
    """What to know before the best design is trained."""
    shares = ", ".join(f"{_CAPS[name]} {share:.1%}" for name, share in best.shares.items())
    said = [f"law: {law.provenance}", f"of its caps the first uses: {shares}"]
    if best.choice is not None and best.choice not in law.parts:
        said.append(f"the law has no constants for {best.choice}; that cut is MobileMoE's finding, or yours")
    return said + [f"warning: {warning}" for warning in best.prediction.warnings]


def save_design(design: Design, law: ScalingLaw, recipe: Recipe | None, path: Path) -> None:
    """TOML: a recipe's [model] table, or the whole recipe with it; JSON: everything about the design.

    In a recipe the pretrain stage is as long as the design's tokens. Raises InputError where it has none.
    """
    model = plain(asdict(design.config))
    if path.suffix == ".json":
        write_json(path, {
            "model": model, "experts": design.experts, "choice": str(design.choice) if design.choice else None,
            "tokens": design.tokens, "prediction": asdict(design.prediction), "costs": design.costs,
            "caps": plain(asdict(design.caps)), "law": law.provenance,
        })  # fmt: skip
        return
    import tomli_w

    values: dict[str, Any] = {"model": model} if recipe is None else to_dict(_with(recipe, design))
    with writing(path), beside(path) as part:
        part.write_text(tomli_w.dumps(values), encoding="utf-8")


def _with(recipe: Recipe, design: Design) -> Recipe:
    stage = recipe.pretrain
    if stage is None:
        raise InputError(f"recipe {recipe.name} has no pretrain stage to take the design's tokens")
    if recipe.model.vocab_size != design.config.vocab_size:
        raise InputError(f"--vocab {design.config.vocab_size} is not the {recipe.model.vocab_size} of recipe {recipe.name}; "
                         "leave it out")  # fmt: skip
    steps = max(1, round(design.tokens / (stage.global_batch * stage.seq_len)))
    longest = max(design.config.max_positions, stage.seq_len)
    return replace(recipe, model=replace(design.config, max_positions=longest), pretrain=replace(stage, steps=steps))


def print_law(law: ScalingLaw) -> None:
    """A column for the common constants and one for each x with its own."""
    from rich.table import Table

    parts = [("common", law.common)] + [(str(choice), part) for choice, part in law.parts.items() if part is not law.common]
    table = Table(title=f"L(N, D, E), N {'with' if law.counts_embedding else 'without'} embedding, in billions")
    table.add_column("constant")
    for name, part in parts:
        table.add_column(f"{name}, {part.runs} runs", justify="right", no_wrap=True)
    for place, item in enumerate(fields(Constants)):
        table.add_row(item.name, *(_constant(part, item.name, place) for _, part in parts))
    table.add_row("RMSE, nats a token", *(f"{part.rmse:.4f}" for _, part in parts))
    _print(table)


def _constant(part: Part, name: str, place: int) -> str:
    value, ends = astuple(part.constants)[place], part.intervals().get(name)
    return f"{value:.4g}" + (f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else "")


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 150).print(table)
