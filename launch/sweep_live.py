"""A search on the terminal, as it stands: trials, front, hypervolume, the predictor, devices, the best models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from launch.sweep_data import SweepRecord
from launch.sweep_text import (
    FITTED,
    STATES,
    best_of,
    limit_words,
    pattern,
    percent,
    quantity,
    shape,
    tried_words,
    usable,
    verdict,
    volume_scale,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_SHOWN = 5
_TONES = {"good": "green", "bad": "red", "none": ""}


def live_table(record: SweepRecord) -> RenderableType:
    """Everything on one screen; nothing in a name or a reason is taken for markup."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    said = verdict(record)
    heading = (record.name, record.phase, *(limit_words(limit) for limit in record.limits))
    parts: list[RenderableType] = [Text(said.headline, style=_TONES[said.tone]), _facts(record)]
    if record.devices:
        parts.append(_devices(record))
    if record.judged():
        parts.append(_best(record))
    return Panel(Group(*parts), title=Text(" \N{MIDDLE DOT} ".join(heading)), title_align="left")


def _facts(record: SweepRecord) -> Table:
    from rich.table import Table
    from rich.text import Text

    states = Counter(trial.state for trial in record.trials)
    factor, unit = volume_scale(record)
    ended = ", ".join(f"{states[state]} {state}" for state in ("ok", *STATES) if states[state]) or "none yet"
    gone = f", {len(record.dropped)} dropped after a second measurement" if record.dropped else ""
    rows = [("trials", ended, ""), ("front", f"{len(record.front)}{gone}", ""),
            ("hypervolume", f"{factor * record.hypervolume[-1]:.4g} {unit}" if record.hypervolume else "-", "")]
    for report in record.needed_models():
        off = "-" if report.model.mape is None else f"{report.model.mape:.2g} % off"
        ranked = "" if report.model.kendall is None else f", Kendall {report.model.kendall:.3f}"
        rows.append((f"model of {report.metric.words}", f"{off}{ranked}, {report.readings} readings, {usable(report)}", ""))
        words, alarm = tried_words(record, report.metric)
        rows += [("  and what it said of trials", words, "red" if alarm else "")] if words else []
    table = Table.grid(padding=(0, 2))
    for name, value, style in rows:
        table.add_row(Text(name, style="dim"), Text(value, style=style))
    return table


def _devices(record: SweepRecord) -> Table:
    from rich.text import Text

    table = _table("device", "state", "measured", "in use", "drift", "failures")
    for device in record.devices:
        failures = ", ".join(f"{kind} {number}" for kind, number in device.failures.items())
        table.add_row(
            Text(device.name), Text(device.state, style="green" if device.state == "healthy" else "red"), str(device.measured),
            "-" if device.utilisation is None else f"{100 * device.utilisation:.0f} %",
            percent(device.drift[-1], sign=True) if device.drift else "-", Text(failures or "-"))  # fmt: skip
    return table


def _best(record: SweepRecord) -> Table:
    """The best within the limits; without limits, or where none keeps them, the best of all. ~ is a prediction."""
    from rich.text import Text

    within = record.within()
    names = [f"{metric.words} ({metric.unit})" if metric.unit not in FITTED else metric.words for metric in record.metrics()]
    table = _table("best within the limits" if within and record.limits else "best", *names, "model", "attention")
    for trial in best_of(record, within or record.judged())[:_SHOWN]:
        known = trial.values()
        values = [Text(("~" if metric.name in known.keys() - (trial.results or {}).keys() else "")
                       + quantity(known.get(metric.name), metric if metric.unit in FITTED else replace(metric, unit="")))
                  for metric in record.metrics()]  # fmt: skip
        table.add_row(Text(f"trial {trial.number}"), *values, Text(shape(trial)), Text(pattern(trial)))
    return table


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(Text(column))
    return table
