"""What a run directory says about itself, read for the report.

Files may be missing (a run of one stage, a run that stopped) or cut off; then the part is absent here and a note says
why. Nothing is ever filled in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.config import Recipe, from_dict, read_toml
from modeling.config import ModelConfig
from stages.config import STAGES, StageName
from stages.errors import InputError

Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of the run, as far as its files go."""

    name: StageName
    metrics: list[Numbers]
    """Logged steps in order, one line a step: where a resumed run logged a step again, the later line counts."""
    before: dict[str, Numbers]
    """Held-out set -> its numbers, before the stage."""
    after: dict[str, Numbers]
    lineage: dict[str, Any] | None
    """Of the newest committed checkpoint."""

    @property
    def training_seconds(self) -> float:
        """Steps since the line before, times their mean duration: what the optimizer steps took, without evaluation."""
        return sum(steps * line.get("step_seconds", 0.0) for steps, line in self._weighted())

    @property
    def data_wait_share(self) -> float | None:
        """Share of the step time spent waiting for data, or None where it was not logged."""
        lines = [(steps, line) for steps, line in self._weighted() if "data_seconds" in line and "step_seconds" in line]
        total = sum(steps * line["step_seconds"] for steps, line in lines)
        return sum(steps * line["data_seconds"] for steps, line in lines) / total if total else None

    def _weighted(self) -> list[tuple[float, Numbers]]:
        steps = [0.0, *(line["step"] for line in self.metrics)]
        return [(now - past, line) for past, now, line in zip(steps, steps[1:], self.metrics, strict=False)]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run directory, read."""

    name: str
    recipe: Recipe | None
    recipe_text: str | None
    model: ModelConfig | None
    stages: dict[StageName, StageRecord]
    """The stages that left any trace, in order."""
    tasks: dict[str, Numbers]
    samples: list[dict[str, str]]
    measurements: dict[str, Any]
    """Of the packed model on a device; empty where it was not measured."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, one sentence each."""


def read_run(directory: Path) -> RunRecord:
    """Read all that the report shows. Raises InputError where `directory` is no folder."""
    if not directory.is_dir():
        raise InputError(f"{directory} is not a folder; expected a run directory")
    notes: list[str] = []
    recipe_text, recipe = _read_recipe(directory / "recipe.toml", notes)
    stages = {}
    for name in STAGES:
        if (directory / name).is_dir():
            stages[name] = _read_stage(directory / name, name, notes)
    documents = [_newest_checkpoint(directory / name / "checkpoints") for name in reversed(stages)]
    model = next((found for path in documents if path and (found := _read_model(path / "model.json", notes))), None)
    tasks = _read_json(directory / "export" / "evaluation.json", notes)
    source = _read_json(directory / "export" / "source.json", notes)
    if isinstance(source, dict) and "left_out" in source:
        left_out = source["left_out"]
        for form, reason in left_out.items() if isinstance(left_out, dict) else ():
            notes.append(f"export/{form} was left out: {reason}")
    return RunRecord(
        name=directory.resolve().name,
        recipe=recipe,
        recipe_text=recipe_text,
        model=model or (recipe.model if recipe else None),
        stages=stages,
        tasks=_table(tasks),
        samples=_read_samples(directory / "samples.json", notes),
        measurements=_read_measurements(directory / "export" / "measurements.json", notes),
        notes=notes,
    )


def _read_measurements(path: Path, notes: list[str]) -> dict[str, Any]:
    found = _read_json(path, notes)
    return found if isinstance(found, dict) else {}


def _read_recipe(path: Path, notes: list[str]) -> tuple[str | None, Recipe | None]:
    if not path.is_file():
        notes.append("recipe.toml is missing: the model's shape and what the held-out sets belong to are unknown.")
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return text, from_dict(read_toml(path), path.name)
    except InputError as error:
        notes.append(f"recipe.toml does not fit this version: {error}")
        return text, None


def _read_stage(folder: Path, name: StageName, notes: list[str]) -> StageRecord:
    evaluation = _read_json(folder / "evaluation.json", notes)
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    checkpoint = _newest_checkpoint(folder / "checkpoints")
    lineage = _read_json(checkpoint / "lineage.json", notes) if checkpoint else None
    return StageRecord(
        name=name,
        metrics=_read_metrics(folder / "metrics.jsonl", notes),
        before=_table(evaluation.get("before")),
        after=_table(evaluation.get("after")),
        lineage={"checkpoint": f"{name}/checkpoints/{checkpoint.name}", **lineage}
        if checkpoint and isinstance(lineage, dict)
        else None,
    )


def _newest_checkpoint(root: Path) -> Path | None:
    """A folder without its commit mark does not exist."""
    found = [path.parent for path in root.glob("step-*/commit.json")]
    return max(found, key=lambda path: (len(path.name), path.name), default=None)


def _read_model(path: Path, notes: list[str]) -> ModelConfig | None:
    values = _read_json(path, notes)
    if not isinstance(values, dict):
        return None
    fields = {item.name for item in dataclasses.fields(ModelConfig)}
    known: dict[str, Any] = {key: value for key, value in values.items() if key in fields}
    try:
        return ModelConfig.from_plain(known)
    except (TypeError, ValueError) as error:
        notes.append(f"{path.parent.name}/model.json is no model of this version: {error}")
        return None


def _read_metrics(path: Path, notes: list[str]) -> list[Numbers]:
    if not path.is_file():
        return []
    by_step: dict[float, Numbers] = {}
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            numbers = _numbers(values) | _experts(values)
        except (ValueError, RecursionError):
            bad += 1
            continue
        if math.isfinite(numbers.get("step", math.nan)):
            by_step[numbers["step"]] = numbers
    if bad:
        notes.append(f"{path.parent.name}/metrics.jsonl has {bad} line(s) that are not JSON; they are left out.")
    return [by_step[step] for step in sorted(by_step)]


def _experts(values: Any) -> Numbers:
    """Of a mixture's line: the load of the busiest and of the idlest expert in any layer, and the share dropped in all."""
    said = values.get("moe") if isinstance(values, dict) else None
    if not isinstance(said, dict):
        return {}
    found = {}
    for name, summary in (("load_max", max), ("load_min", min), ("dropped", statistics.fmean)):
        layers = said.get(name)
        if isinstance(layers, list) and layers and all(isinstance(one, int | float) and math.isfinite(one) for one in layers):
            found[f"experts_{name}"] = float(summary(layers))
    return found


def _read_samples(path: Path, notes: list[str]) -> list[dict[str, str]]:
    values = _read_json(path, notes)
    keys = ("stage", "prompt", "text")
    rows = [row for row in values if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in keys)] \
        if isinstance(values, list) else []  # fmt: skip
    if isinstance(values, list) and len(rows) < len(values):
        notes.append(f"samples.json has {len(values) - len(rows)} entries without stage, prompt and text; left out.")
    return [{key: row[key] for key in keys} for row in rows]


def _read_json(path: Path, notes: list[str]) -> Any:
    """The value, or None where the file is absent; a file that is there but unreadable is noted."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.parent.name}/{path.name} cannot be read ({error}); its part is left out.")
        return None


def _table(value: Any) -> dict[str, Numbers]:
    if not isinstance(value, Mapping):
        return {}
    return {str(name): _numbers(row) for name, row in value.items() if isinstance(row, Mapping)}


def _numbers(value: Any) -> Numbers:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return {
        key: float(item) for key, item in value.items() if isinstance(item, int | float) and not isinstance(item, bool)
    }
