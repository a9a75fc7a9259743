"""Search architectures for a device and a latency limit: measured, trained briefly, the best of both on a front.

    python launch/sweep.py --recipe quickstart_search
    python launch/sweep.py --recipe flash_latency --device ssh://phone --quality.backbone RUN --output-dir runs/flash
    python launch/sweep.py status DIR              what there is
    python launch/sweep.py resume DIR              go on, also after a kill; --trials N for more, --retrain K to train picks
    python launch/sweep.py export DIR --pick 3     recipes, with inherited checkpoints, for launch/recipe.py --init-from
    python launch/sweep.py check DIR               does the database agree with the optimizer's state?
    python launch/sweep.py replay DIR              does the optimizer ask the same again, given the stored answers?

A search is killed and resumed at any point; its database is DIR/sweep.db.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import Parser, run  # noqa: E402
from stages.errors import InputError, RunError  # noqa: E402

if TYPE_CHECKING:
    from launch.sweep_config import SweepRecipe
    from search.store import Store

VERBS = ("status", "resume", "export", "check", "replay")


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in VERBS:
        _verb(sys.argv[1], sys.argv[2:])
        return
    parser = Parser(__doc__)
    parser.add_argument("--device", action="append", metavar="D", help="in place of the recipe's; again for more of a class")
    for name, of in (("trials", "N"), ("retrain", "K"), ("optimizer", "NAME")):
        parser.add_argument(f"--{name}", metavar=of, help="in place of the recipe's")
    options, overrides = parser.parse()
    from launch.sweep_config import load_sweep, save_sweep

    given = {name: getattr(options, name) for name in ("trials", "retrain", "optimizer")}
    overrides |= {name: value for name, value in given.items() if value is not None}
    sweep = load_sweep(options.recipe, overrides, options.device)
    directory = options.output_dir or Path("runs") / sweep.name
    if (directory / "sweep.toml").is_file():
        raise InputError(f"{directory} already holds a sweep; `launch/sweep.py resume {directory}` goes on with it")
    if directory.is_dir() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty and holds no sweep; name another --output-dir")
    _check_devices(sweep)
    if sweep.quality.backbone:
        from stages.checkpoint import resolve

        resolve(sweep.quality.backbone)
    directory.mkdir(parents=True, exist_ok=True)
    save_sweep(sweep, directory / "sweep.toml")
    _run(sweep, directory)


def _check_devices(sweep: SweepRecipe) -> None:
    """They have known names and answer, before minutes go into a backbone; and so does the runtime that packs for them."""
    from kernels.runtime import RuntimeLibraryError, library
    from search.devices import DeviceError, open_device
    from search.members import Member

    try:
        library()
    except RuntimeLibraryError as error:
        raise RunError(str(error)) from None
    for name in sweep.device.names:
        try:
            device = open_device(name)
            if len(sweep.device.names) > 1 and device.fidelity == "analytic":
                raise InputError(f"device {name} is a model, named beside others; its numbers and theirs would be taken "
                                 "for one device's: name it alone")
            if not Member(device).alive():
                raise RunError(f"device {name} does not answer; start it, or name another with --device")
        except ValueError as error:
            raise InputError(str(error)) from None
        except DeviceError as error:
            raise RunError(str(error)) from None


def _verb(verb: str, argv: list[str]) -> None:
    parser = Parser(__doc__, recipe=False)
    parser.add_argument("directory", type=Path, metavar="DIR")
    if verb == "export":
        parser.add_argument("--pick", type=int, default=1, metavar="K", help="how many models of the front (default 1)")
        parser.add_argument("--output", type=Path, metavar="P", help="folder for them (default DIR/picks)")
    if verb == "replay":
        parser.add_argument("--optimizer", metavar="NAME", help="only the sweep's own: no other's questions have answers here")
    if verb == "resume":
        parser.add_argument("--trials", type=int, metavar="N", help="go on to so many")
        parser.add_argument("--retrain", type=int, metavar="K", help="train so many models of the front through all stages")
    options, _ = parser.parse(argv)
    from launch.config import read_toml
    from launch.sweep_config import from_dict, save_sweep, to_dict

    saved = options.directory / "sweep.toml"
    if not saved.is_file():
        raise InputError(f"{options.directory} holds no sweep (no sweep.toml); start one with launch/sweep.py --recipe NAME")
    sweep = from_dict(read_toml(saved), str(saved))
    if verb == "resume":
        changes = {name: value for name in ("trials", "retrain") if (value := getattr(options, name)) is not None}
        _check_trials(options.directory, options.trials)
        if changes:
            sweep = from_dict({**to_dict(sweep), **changes}, "option")
            save_sweep(sweep, saved)
        _check_devices(sweep)
        _run(sweep, options.directory)
    elif verb == "status":
        _status(options.directory, sweep)
    elif verb == "export":
        _export(options.directory, sweep, options.pick, options.output or options.directory / "picks")
    elif verb == "replay":
        from launch.sweep_replay import replay_sweep

        sys.stdout.write(replay_sweep(sweep, options.directory, options.optimizer) + "\n")
    else:
        from launch.sweep_run import disagreements

        problems = disagreements(sweep, options.directory)
        for problem in problems:
            sys.stdout.write(problem + "\n")
        if problems:
            raise RunError(f"{len(problems)} differences between the database and the optimizer's state")
        sys.stdout.write("the database and the optimizer's state agree\n")


def _check_trials(directory: Path, wanted: int | None) -> None:
    from launch.sweep_run import DATABASE
    from search.store import Store

    if wanted is None or not (directory / DATABASE).is_file():
        return
    with closing(Store.read(directory / DATABASE)) as store:
        if wanted < (asked := store.num_trials()):
            raise InputError(f"--trials {wanted}, but this sweep has {asked} already; give at least so many, or leave it out")


def _run(sweep: SweepRecipe, directory: Path) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.logging import RichHandler

    from launch.sweep_live import live_table
    from launch.sweep_run import record_of, run_sweep
    from search.database import StoreError
    from search.devices import DeviceError
    from search.service import SweepError

    console = Console(stderr=True)
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None
    above = [RichHandler(console=console, show_time=False, show_path=False)] if live else None
    logging.basicConfig(level=logging.WARNING, format="%(message)s" if live else logging.BASIC_FORMAT, handlers=above)
    shown, due = -1, 0.0

    def tick(store: Store) -> None:
        """The live table once a second on a terminal (less often where that takes long), a line a trial elsewhere."""
        nonlocal shown, due
        done = store.num_trials("ok", "infeasible", "failed")
        if live is not None:
            live.start()  # not before there is something to show: training a backbone has a bar of its own
            if (start := time.monotonic()) > due:
                live.update(live_table(record_of(sweep, store, directory)), refresh=True)
                due = time.monotonic() + max(1.0, 10 * (time.monotonic() - start))
        elif done != shown:
            _say(f"{store.phase}: {done} of {sweep.trials} trials")
        shown = done

    try:
        found = run_sweep(sweep, directory, _say, tick)
    except StoreError as error:
        raise InputError(str(error)) from None
    except SweepError as error:
        backbone = directory / "backbone"
        again = f" (in another --output-dir; --quality.backbone {backbone} saves its training)"
        raise InputError(f"{error}{again if backbone.is_dir() else ''}") from None
    except DeviceError as error:
        raise RunError(f"{error}; launch/sweep.py resume {directory} goes on") from None
    finally:
        if live is not None:
            live.stop()
    _status(directory, sweep)
    if not found:
        raise RunError("no model is within the limits; raise goal.ttft_ms, or let it try more (resume --trials N)")
    losses = [(trial.results or {}).get("loss", math.inf) for trial in found]
    if min(losses) > sweep.goal.loss:
        _say(f"warning: the best loss is {min(losses):.4g}; goal.loss = {sweep.goal.loss:g} was to be just of no use. Train "
             "longer, or set it higher, so that the search can tell models apart by it")


def _status(directory: Path, sweep: SweepRecipe) -> None:
    """The table of how it stands, and the page."""
    from rich.console import Console

    from launch.sweep_live import live_table
    from launch.sweep_report import write_sweep_report
    from launch.sweep_run import DATABASE, record_of
    from search.store import Store

    with closing(Store.read(directory / DATABASE)) as store:
        record = record_of(sweep, store, directory)
    Console().print(live_table(record))
    _say(f"report: {write_sweep_report(record, directory / 'report.html')}")


def _export(directory: Path, sweep: SweepRecipe, count: int, output: Path) -> None:
    from launch.sweep_picks import export_picks, start_of

    if count < 1:
        raise InputError(f"--pick {count}; expected at least 1")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder for the picks")
    if output.exists() and any(output.iterdir()):
        raise InputError(f"--output {output} is not empty; name another, nothing is overwritten")
    for folder in export_picks(sweep, directory, count, output, _say):
        sys.stdout.write(f"{folder}: python launch/recipe.py {' '.join(start_of(folder))} --output-dir runs/{folder.name}\n")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    run(main)
