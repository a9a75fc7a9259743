"""The latency model on this machine's own runtime: how well it predicts architectures that were never measured.

    python benchmarks/latency_model.py --folder runs/latency --processor-time          # about ten minutes, then the tables
    python benchmarks/latency_model.py --folder runs/latency --threads 2 --prompt-tokens 128
    python benchmarks/latency_model.py --folder runs/mixtures --experts --processor-time --prompt-tokens 128
    python benchmarks/latency_model.py --folder runs/latency --refit                   # the tables again; measures nothing

Readings are bought through the farm as a search buys them (search/readings.py): 40 at random, then 20 at a time where they are
worth most, until the gates are met. Then random ones follow up to `--readings`, so that it can be told what more of them
are worth; then architectures drawn independently, which no model sees, and some of those once more, last. Weights are random.
Everything read is kept in the folder, and a setting that was stopped goes on: `--minutes` bounds a round.

With `--experts` the architectures are dense models and mixtures of experts; the held-out mixtures are also told by
themselves. With `--processor-time` a job ends with the processor time of one thread, as `Policy.processor_time` has it for a
computer that others use too; wall times are among the same repeats and get tables of their own. The tables are of all
settings in the folder: the model's figures, those of proxies (times one factor, fitted to the same readings), how far the same
architecture read again is off (which bounds what any model can reach), and what `transfer` makes of one setting's model and a
few readings of another, as if that were another device.
Refuses to print while the tests of the model and of the kernels are red. `--output F.json` also keeps the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _latency_tables as tables  # noqa: E402
from benchmarks import train_step  # noqa: E402
from benchmarks._latency_readings import KV, Setting, build_ahead, fits, measure, rounds, settings_in  # noqa: E402

TRANSFER = (10, 20, 30, 50)
TESTS = ("tests/search/test_latency.py", "tests/kernels/test_check.py")


def main() -> int:
    options = arguments()
    if options.build_only:
        build_ahead(options.folder, Setting(prompt_tokens=1, experts=options.experts).space, options.held_out, options.readings)
        return 0
    if not options.refit:
        setting = Setting(prompt_tokens=options.prompt_tokens, threads=options.threads, processor_time=options.processor_time,
                          experts=options.experts)  # fmt: skip
        done = measure(options.folder, setting, readings=options.readings, held_out=options.held_out, again=options.again,
                       minutes=options.minutes, conditions=train_step.conditions())  # fmt: skip
        if not done:
            train_step.note(f"{options.minutes:g} minutes are over before all was read; the same command goes on")
        if options.measure_only or not done:
            return 0
    train_step.TESTS = TESTS  # type: ignore[misc]
    train_step.require_green()
    lines, kept = all_tables(options.folder)
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        options.output.write_text(json.dumps(kept, indent=1))
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the readings, and the models that were measured")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true", help="judge readings by processor time (one thread only)")
    parser.add_argument("--experts", action="store_true", help="dense models and mixtures of experts")
    parser.add_argument("--readings", type=int, default=150, help="at most (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=60, help="architectures to predict (default: %(default)s)")
    parser.add_argument("--again", type=int, default=20, help="of those, read twice (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of one round (default: %(default)s)")
    parser.add_argument("--build-only", action="store_true", help="write the models that will be measured, and end")
    parser.add_argument("--measure-only", action="store_true", help="print no tables")
    parser.add_argument("--refit", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    if options.threads != 1 and options.processor_time:
        parser.error(f"--threads {options.threads} --processor-time: that says nothing of how long several take; expected 1")
    least_of = {"prompt_tokens": 1, "threads": 1, "readings": tables.LEAST, "held_out": tables.LEAST, "again": 0}
    for name, least in least_of.items():
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}: expected at least {least}")
    if options.refit and not settings_in(options.folder):
        parser.error(f"--refit: {options.folder} has no readings; measure first")
    return options


def all_tables(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Of every setting in the folder that has enough readings."""
    lines = [f"{key}: {value}" for key, value in train_step.conditions().items()]
    lines.append(f"cache of keys and values: {KV}")
    kept: dict[str, Any] = {"settings": [], "transfer": []}
    settings = settings_in(folder)
    for setting in settings:
        lines += ["", *measured_text(folder, setting)]
        for found in tables.setting_figures(folder, setting):
            lines += ["", *tables.figures_text(found)]
            kept["settings"].append(found)
    for old, new in itertools.permutations(settings, 2):
        if old.threads > new.threads or old.experts != new.experts:
            continue
        if found := tables.transfer_figures(folder, old, new, TRANSFER):
            lines += ["", *tables.transfer_text(found)]
            kept["transfer"].append(found)
    return lines, kept


def measured_text(folder: Path, setting: Setting) -> list[str]:
    """How a setting's readings came about."""
    clock = "processor time" if setting.processor_time else "wall time"
    lines = [f"== {setting.threads} thread{'s' if setting.threads > 1 else ''}, prompt of {setting.prompt_tokens} tokens, then "
             f"{setting.decode_tokens} tokens decoded; jobs judged by {clock}; {setting.space.size():,} architectures"
             f"{', with mixtures of experts' if setting.experts else ''}"]  # fmt: skip
    for number, part in enumerate(rounds(folder, setting), 1):
        before, after = part["load"]
        lines.append(f"round {number}: revision {part['conditions']['revision']}, load {before:.1f} before, {after:.1f} after")
    for bought, passed, failures in fits(folder, setting):
        lines.append(f"gates at {bought} readings: {'met' if passed else '; '.join(failures)}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
