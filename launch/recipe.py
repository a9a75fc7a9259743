"""Run a whole recipe: its stages in order, then export, evaluation and report.

One worker group runs all stages, so the start is paid once. A second run of the command with --resume goes on
where the first stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import run  # noqa: E402
from launch.commands import recipe_command  # noqa: E402

if __name__ == "__main__":
    run(lambda: recipe_command(__doc__))
