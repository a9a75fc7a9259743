"""The four comparisons at the top of the report, each computed from the run's own held-out numbers.

1. Pre-training lowers bits per byte on held-out text of the pre-training sources.
2. Mid-training lowers it again on its domain: the sources whose share of the mixture grew.
3. SFT lowers the loss on the assistant tokens of held-out conversations.
4. QAT ends closer to the SFT model's loss on those than round-to-nearest of the same SFT model does. QAT starts from
   round-to-nearest, so that is the QAT stage's `before`.

A comparison over several held-out sets held only if it held on each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from data_pipeline.config import HeldOutConfig
from launch.config import Recipe
from launch.report_data import Numbers, RunRecord
from stages.config import StageConfig, StageName

BITS_PER_BYTE = "bits_per_byte"
LOSS = "loss"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One held-out set's part of a comparison."""

    held_out: str
    numbers: tuple[tuple[str, float], ...]
    """Label and value, in the order they are shown; the last one is the result."""
    held: bool
    change: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    title: str
    unit: str
    explanation: str
    rows: list[Measured] = field(default_factory=list)
    missing: str = ""
    """Why there is no verdict."""

    @property
    def verdict(self) -> str:
        """`held`, `did not hold`, or `not measured`: a set that lacks a number withholds the verdict of all."""
        if self.missing or not self.rows:
            return "not measured"
        return "held" if all(row.held for row in self.rows) else "did not hold"


def four_comparisons(run: RunRecord) -> list[Comparison]:
    return [_pretraining(run), _midtraining(run), _instruction_tuning(run), _quantization(run)]


def _pretraining(run: RunRecord) -> Comparison:
    return _lowered(
        run, "pretrain", BITS_PER_BYTE, lambda recipe: _sets(recipe, "text", _shares(recipe.pretrain)),
        title="Pre-training lowers held-out bits per byte", unit="bits per byte",
        explanation="Held-out documents of the pre-training sources, before and after the stage.",
    )  # fmt: skip


def _midtraining(run: RunRecord) -> Comparison:
    def domain(recipe: Recipe) -> list[str]:
        before, after = _shares(recipe.pretrain), _shares(recipe.midtrain)
        grown = {name: share for name, share in after.items() if share > before.get(name, 0.0) + 1e-9}
        return _sets(recipe, "text", grown or after)

    return _lowered(
        run, "midtrain", BITS_PER_BYTE, domain,
        title="Mid-training lowers it again on its domain", unit="bits per byte",
        explanation="Held-out documents of the sources whose share grew in mid-training, before and after the stage.",
    )  # fmt: skip


def _instruction_tuning(run: RunRecord) -> Comparison:
    return _lowered(
        run, "sft", LOSS, lambda recipe: _sets(recipe, "chat", _shares(recipe.sft)),
        title="SFT lowers the loss on assistant tokens", unit="nats per assistant token",
        explanation="Held-out conversations; only the assistant's tokens count.",
    )  # fmt: skip


def _lowered(
    run: RunRecord,
    stage: StageName,
    metric: str,
    choose: Callable[[Recipe], list[str]],
    *,
    title: str,
    unit: str,
    explanation: str,
) -> Comparison:
    """Held where `metric` after the stage is below `metric` before it."""
    rows: list[Measured] = []
    names, missing = _chosen(run, stage, choose)
    for name in names:
        before, after = _value(run, stage, "before", name, metric), _value(run, stage, "after", name, metric)
        if before is None or after is None:
            absent = "before" if before is None else "after"
            missing = missing or f"{stage}/evaluation.json has no {metric} of {name!r} {absent} the stage."
            continue
        rows.append(Measured(held_out=name, numbers=(("before", before), ("after", after)), held=after < before,
                             change=_percent(after, before)))  # fmt: skip
    return Comparison(title=title, unit=unit, explanation=explanation, rows=rows, missing=missing)


def _quantization(run: RunRecord) -> Comparison:
    rows: list[Measured] = []
    names, missing = _chosen(run, "qat", lambda recipe: _sets(recipe, "chat", _shares(recipe.sft or recipe.qat)))
    for name in names:
        sft = _value(run, "sft", "after", name, LOSS)
        rounded = _value(run, "qat", "before", name, LOSS)
        trained = _value(run, "qat", "after", name, LOSS)
        if sft is None or rounded is None or trained is None:
            absent = "sft/evaluation.json (after)" if sft is None else "qat/evaluation.json"
            missing = missing or f"{absent} has no {LOSS} of {name!r}."
            continue
        gap_rounded, gap_trained = abs(rounded - sft), abs(trained - sft)
        rows.append(
            Measured(
                held_out=name,
                numbers=(("SFT", sft), ("rounded to nearest", rounded), ("QAT", trained)),
                held=gap_trained < gap_rounded,
                change=f"distance to SFT: {gap_rounded:.4f} rounded, {gap_trained:.4f} QAT",
            )
        )
    return Comparison(
        title="QAT is closer to SFT than rounding is", unit="nats per assistant token", rows=rows, missing=missing,
        explanation="The same SFT model: unquantized, rounded to nearest without training, and after QAT.",
    )  # fmt: skip


def _chosen(run: RunRecord, stage: StageName, choose: Callable[[Recipe], list[str]]) -> tuple[list[str], str]:
    """The held-out sets to compare, or why there are none."""
    if run.recipe is None:
        return [], "Without a readable recipe.toml it is unknown which held-out set belongs to which stage."
    if getattr(run.recipe, stage) is None:
        return [], f"The recipe has no {stage} stage."
    if stage not in run.stages:
        return [], f"The {stage} stage has not been run in this directory."
    names = choose(run.recipe)
    return names, "" if names else f"The recipe keeps no held-out set for {stage} (train.held_out)."


def _shares(stage: StageConfig | None) -> dict[str, float]:
    """Source name -> its share of the stage's sequences."""
    sources = stage.data.sources if stage else ()
    total = sum(source.weight for source in sources)
    return {source.name: source.weight / total for source in sources if source.weight > 0}


def _sets(recipe: Recipe, kind: str, sources: dict[str, float]) -> list[str]:
    """Held-out sets cut from these sources alone; where there are none, those cut from some of them."""
    items: list[HeldOutConfig] = [item for item in recipe.train.held_out if item.kind == kind and item.sources]
    whole = [item.name for item in items if all(name in sources for name in item.sources)]
    return whole or [item.name for item in items if any(name in sources for name in item.sources)]


def _value(run: RunRecord, stage: StageName, when: str, held_out: str, metric: str) -> float | None:
    record = run.stages.get(stage)
    if record is None:
        return None
    table: dict[str, Numbers] = record.before if when == "before" else record.after
    return table.get(held_out, {}).get(metric)


def _percent(after: float, before: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}") if before else ""
