"""What the parts of a recipe must agree on. The bounds of single values stand beside the fields."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING

from data_pipeline.config import SourceConfig
from launch.tasks import find_clash

if TYPE_CHECKING:
    from launch.config import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Raises ValueError with one line for the first disagreement."""
    for problem in _problems(recipe):
        raise ValueError(problem)


def _problems(recipe: Recipe) -> Iterator[str]:
    known = {source.name for source in recipe.sources()}
    for held_out in recipe.train.held_out:
        if missing := [name for name in held_out.sources if name not in known]:
            yield f"train.held_out {held_out.name!r} names the source {missing[0]!r}; the stages have {sorted(known)}"
    if clash := find_clash(recipe.evaluation.tasks):
        yield f"evaluation.tasks: {clash}"
    launch = recipe.launch
    if launch.nodes and launch.workers % launch.nodes:
        yield (f"launch.workers={launch.workers} does not spread evenly over launch.nodes={launch.nodes}; "
               "use a multiple")  # fmt: skip
    for name, stage in recipe.stages().items():
        if stage.global_batch % launch.workers:
            yield (f"{name}.global_batch={stage.global_batch} does not divide over launch.workers={launch.workers}; "
                   "use a multiple")  # fmt: skip
    yield from _uneven_held_out(recipe)


def _uneven_held_out(recipe: Recipe) -> Iterator[str]:
    """A document held out in one stage must not be trained on in another, so stages over one source hold out alike."""
    for (first, one), (second, other) in combinations(recipe.stages().items(), 2):
        fractions = one.data.held_out_fraction, other.data.held_out_fraction
        shared = [a.name for a in one.data.sources for b in other.data.sources if _same_source(a, b)]
        if fractions[0] != fractions[1] and shared:
            yield (f"{first}.data.held_out_fraction={fractions[0]:g} and {second}.data.held_out_fraction={fractions[1]:g}, "
                   f"but both stages read the source {shared[0]!r}; make them equal, or what one holds out the other trains on")


def _same_source(one: SourceConfig, other: SourceConfig) -> bool:
    def place(source: SourceConfig) -> tuple[str, str]:
        return source.path or source.format, source.subset

    return one.name == other.name or place(one) == place(other)
