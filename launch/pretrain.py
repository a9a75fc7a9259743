"""Pre-train a recipe's model from random weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the root in place of launch/, whose names would hide others

from launch.cli import run  # noqa: E402
from launch.commands import stage_command  # noqa: E402

if __name__ == "__main__":
    run(lambda: stage_command("pretrain", __doc__))
