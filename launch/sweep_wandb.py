"""A search in Weights & Biases: a row a trial, with its last trial a round's figures, at the end the front as table and plot.

A thread reads the database, as anyone may, and hands rows to the queue of `stages.metrics.WandbLog`: nothing of it is on the
search's path, and what fails is a warning. Rows are numbered by the order in which the optimizer was told, which the
database keeps, so a search that is resumed logs under the same numbers, and none twice.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from launch.sweep_collect import front_of
from launch.sweep_config import SweepRecipe, to_dict
from launch.sweep_data import FrontPoint, SweepRecord, TrialRecord
from launch.sweep_text import pattern
from modeling.config import ModelConfig
from search.alarms import LIMIT
from search.records import Trial
from search.store import Store

if TYPE_CHECKING:
    from stages.metrics import WandbLog

logger = logging.getLogger(__name__)
POLL_S = 2.0
STEPS = 3
"""W&B's step n * STEPS is the nth answer; one more is the front where the search was stopped after it, two more where it is
confirmed."""


class SweepWatch:
    """Use as a context around a search whose database is open."""

    def __init__(self, sweep: SweepRecipe, directory: Path, database: Path) -> None:
        self.sweep, self.directory, self.database = sweep, directory, database
        self._stop, self._logged = threading.Event(), 0
        self._thread = threading.Thread(target=self._watch, name="sweep-wandb", daemon=True)

    def __enter__(self) -> SweepWatch:
        if self.sweep.recipe.tracking.wandb != "disabled":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(60.0)

    def _watch(self) -> None:
        from stages.metrics import WandbLog  # torch with it, which `sweep.py status` does without

        tracking, name = self.sweep.recipe.tracking, self.sweep.name
        log = WandbLog(
            self.directory, mode=tracking.wandb, project=tracking.project, group=f"{name}-{self.directory.name}",
            name=f"{name}-{self.directory.name}", config=to_dict(self.sweep), elsewhere=self.database.name,
            axes={"trial/*": "trial/number", "config/*": "trial/number", "round/*": "round/trials"},
        )  # fmt: skip
        try:
            with closing(Store.read(self.database)) as store:
                while not self._stop.wait(POLL_S):
                    self._look(log, store, last=False)
                self._look(log, store, last=True)
        except Exception as error:  # whatever it is: the search does not end for it
            logger.warning("what W&B gets stopped (%s: %s); the search goes on, %s has all numbers", type(error).__name__,
                           error, self.database)  # fmt: skip
        finally:
            log.close()

    def _look(self, log: WandbLog, store: Store, *, last: bool) -> None:
        """Hand over what is new."""
        from launch.sweep_run import record_of

        told = store.told()
        if len(told) == self._logged and not last:
            return
        record, work = record_of(self.sweep, store, self.directory), measured_by(store)
        trials = {trial.number: trial for trial in record.trials}
        for place, trial in enumerate(told[self._logged :], self._logged + 1):
            row = {"step": STEPS * place, **trial_row(trials[trial.number], trial, work.get(trial.number))}
            if place % self.sweep.batch == 0:
                row |= self._round(record, told[:place], now=place == len(told))
            log.write(row)
        self._logged = len(told)
        if last and told and (record.front or record.dropped):
            step = STEPS * len(told) + (2 if record.phase == "done" else 1)
            log.write({"step": step, "front": partial(front_table, record),
                       "front_plot": partial(front_picture, record, self.directory / "wandb" / "front.png"),
                       **self._round(record, told, now=True)})  # fmt: skip

    def _round(self, record: SweepRecord, told: list[Trial], *, now: bool) -> dict[str, Any]:
        trials = {trial.number: trial for trial in record.trials}
        part = replace(record, trials=tuple(trials[trial.number] for trial in told))
        return round_row(part, record.hypervolume[len(told) - 1], -(-len(told) // self.sweep.batch), now=now)


def measured_by(store: Store) -> dict[int, tuple[str, float]]:
    """By trial: the device that its result is from, and seconds of all its measurements."""
    rows = store.rows("SELECT jobs.trial AS trial, measurements.device AS device, role, measurements.started AS started,"
                      " measurements.ended AS ended FROM measurements JOIN jobs ON jobs.id = job"
                      " WHERE jobs.trial IS NOT NULL ORDER BY measurements.id")  # fmt: skip
    found: dict[int, tuple[str, float]] = {}
    for row in rows:
        device, seconds = found.get(row["trial"], ("", 0.0))
        found[row["trial"]] = (row["device"] if row["role"] == "result" else device, seconds + row["ended"] - row["started"])
    return found


def trial_row(record: TrialRecord, trial: Trial, work: tuple[str, float] | None) -> dict[str, Any]:
    """What is known of a trial that has ended; numbers that are not there are left out."""
    device, seconds = work or ("", 0.0)
    results = dict(record.results or {})
    row = {"trial/number": record.number, "trial/state": record.state, "trial/reason": record.reason, "trial/device": device,
           "trial/fidelity": record.fidelity or "", "trial/measure_seconds": seconds,
           "trial/seconds": seconds + results.get("score_seconds", 0.0)}  # fmt: skip
    row |= {f"trial/{name}": value for name, value in results.items()}
    row |= {f"trial/noise/{name}": value for name, value in record.noise.items()}
    for name, value in record.predicted.items():
        row[f"trial/predicted/{name}"] = value
        if results.get(name):
            row[f"trial/off_percent/{name}"] = 100 * (value / results[name] - 1)
    if record.duplicate_of is not None:
        row["trial/duplicate_of"] = record.duplicate_of
    candidate = trial.config["candidate"]
    row |= {f"config/{name}": value for name, value in candidate.items() if not name.startswith("attention.")}
    if (model := record.model()) is not None:
        row |= {"config/attention": pattern(record), "config/parameters": model.num_params(),
                "config/active_parameters": model.num_active_params()}  # fmt: skip
    return row


def round_row(record: SweepRecord, hypervolume: float, number: int, *, now: bool) -> dict[str, Any]:
    """Of the trials in `record`. What is only known as it is at present, devices and their failures, is of a round that has
    just ended (`now`), not of one that is told late."""
    row: dict[str, Any] = {"round/number": number, "round/trials": len(record.trials), "round/hypervolume": hypervolume,
                           "round/front_size": len(front_of(record))}  # fmt: skip
    failures = Counter(trial.state for trial in record.trials if trial.state != "ok")
    for report in record.needed_models():
        offs = [100 * abs(miss.off) for miss in record.tried(report.metric.name)]
        row[f"round/predictor/{report.metric.name}/held_out_percent"] = report.model.mape
        if offs:
            row |= {f"round/predictor/{report.metric.name}/median_percent": median(offs),
                    f"round/predictor/{report.metric.name}/worst_percent": max(offs),
                    f"round/predictor/{report.metric.name}/alarms": sum(off > 100 * LIMIT for off in offs)}  # fmt: skip
    if now:
        for device in record.devices:
            failures.update(device.failures)
            row[f"round/utilisation/{device.name}"] = device.utilisation
    row |= {f"round/failures/{kind}": count for kind, count in failures.items()}
    return {key: value for key, value in row.items() if value is not None}


def front_table(record: SweepRecord, wandb: Any) -> Any:
    """A `wandb.Table`, a row a model of the front and of those dropped from it."""
    trials = {trial.number: trial for trial in record.trials}
    metrics = record.metrics()
    columns = ["trial", "dropped", "confirmed"]
    for metric in metrics:
        columns += [metric.name, *(f"{metric.name} {what}" for what in ("low", "high", "again", "predicted"))]
    columns += ["layers", "width", "ffn", "heads", "kv_heads", "attention", "parameters", "active_parameters",
                "experts", "experts_a_token", "expert_width", "shared_width"]  # fmt: skip
    rows = [_front_row(trials[point.trial], point, [metric.name for metric in metrics], gone)
            for gone, points in ((False, record.front), (True, record.dropped)) for point in points]  # fmt: skip
    return wandb.Table(columns=columns, data=rows)


def _front_row(trial: TrialRecord, point: FrontPoint, names: list[str], gone: bool) -> list[Any]:
    row: list[Any] = [trial.number, point.reason if gone else "", point.confirmed]
    for name in names:
        low, high = point.intervals.get(name, (None, None))
        row += [(trial.results or {}).get(name), low, high, point.again.get(name), trial.predicted.get(name)]
    model = trial.model()
    if model is None:
        return row + [None] * 12
    return [*row, model.num_executed_layers, model.hidden_size, model.ffn_size, model.num_heads, model.num_kv_heads,
            pattern(trial), model.num_params(), model.num_active_params(), *_experts(model)]  # fmt: skip


def _experts(model: ModelConfig) -> list[int | None]:
    moe = model.moe
    return [None] * 4 if moe is None else [moe.num_experts, moe.top_k, moe.expert_size, moe.shared_size]


def front_picture(record: SweepRecord, path: Path, wandb: Any) -> Any:
    """A `wandb.Image` of the first two objectives, also kept at `path`; of one objective, over the trials."""
    from matplotlib.figure import Figure

    y, x = record.objectives[0], record.objectives[1] if len(record.objectives) > 1 else None
    places = {trial.number: (trial.values()[x.name] if x else float(trial.number), trial.values()[y.name])
              for trial in record.judged()}  # fmt: skip
    places = {number: place for number, place in places.items() if all(map(math.isfinite, place))}
    front = sorted(places[point.trial] for point in record.front if point.trial in places)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if places:
        axes.plot(*zip(*places.values(), strict=True), "o", color="0.7", ms=4, label="trials")
    if front:
        axes.plot(*zip(*front, strict=True), "o-", drawstyle="steps-post", color="#2463c9", label="front")
    axes.set(xlabel=f"{x.words} ({x.unit})" if x else "trial", ylabel=f"{y.words} ({y.unit})", title=record.name)
    axes.legend()
    figure.savefig(path, dpi=120)
    return wandb.Image(str(path))
