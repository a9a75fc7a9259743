"""What all commands share: `--recipe`, `--output-dir`, dotted overrides, exit statuses, one-line errors.

Exit status: 0 done; 2 the input is wrong; 1 anything else. A fault that a user can mend is one line on standard
error; only a bug of ours shows a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from launch.streams import guard
from stages.errors import InputError, RunError

OURS = {"modeling", "data_pipeline", "stages", "quant", "kernels", "launch", "search"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which leaves dotted overrides (`--train.steps 20`) to us."""

    def __init__(self, description: str | None, *, recipe: bool = True) -> None:
        first, _, rest = (description or "").partition("\n")
        super().__init__(
            description=first,
            epilog=rest.strip() + (_OVERRIDE_HELP if recipe else ""),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.takes_recipe = recipe
        if recipe:
            self.add_argument("--recipe", metavar="NAME_OR_FILE", required=True, help="a recipe's name or its TOML file")
            self.add_argument("--output-dir", type=Path, metavar="DIR", help="the run directory (default runs/RECIPE)")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, dict[str, str]]:
        """Known options and the dotted overrides, in order."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        if not self.takes_recipe:
            return self.parse_args(arguments), {}
        known, rest = self.parse_known_args(arguments)
        return known, _overrides(rest)


_OVERRIDE_HELP = """

Overrides: any key of the recipe, dashes or underscores, e.g. --train.steps 20 --train.log-every 1
--checkpoint.every 10 --launch.workers 2 --pretrain.optim.lr 1e-3. `none` unsets an optional key."""


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    index = 0
    while index < len(rest):
        token = rest[index]
        match = re.fullmatch(r"--([A-Za-z_][\w-]*(?:\.[\w-]+)+)(?:=(.*))?", token, flags=re.DOTALL)
        if match is None:
            raise InputError(f"unexpected argument {token!r}; options are in --help, overrides look like --train.steps 20")
        key, value = match[1], match[2]
        if value is None:
            index += 1
            if index == len(rest):
                raise InputError(f"--{key} has no value; write --{key} VALUE")
            value = rest[index]
        found[key] = value
        index += 1
    return found


def is_ours(error: BaseException) -> bool:
    """Whether this is a fault of the input that one of our folders found (DataError, ConversionError ...)."""
    return isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in OURS


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command's main and exit with its status."""
    guard()
    try:
        _run_and_flush(main)
    except (InputError, RunError) as error:
        _say(error)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what is committed stays, and resuming goes on from it\n")
        sys.exit(1)
    except Exception as error:
        if is_ours(error):
            _say(error)
            sys.exit(2)
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _run_and_flush(main: Callable[[], None]) -> None:
    try:
        main()
    except SystemExit as exit:  # argparse's --help
        if exit.code:
            raise
    sys.stdout.flush()  # here, where a full disk can still be told


def _say(error: BaseException) -> None:
    with contextlib.suppress(OSError):  # a full disk under standard error: the status still says it
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
