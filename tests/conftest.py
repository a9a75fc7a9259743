"""How tests go to two processes: by file, so that what a file's tests share is made once; all that start Ray to one, first.

pytest-xdist's own `--dist loadgroup` cannot be used: from pytest 9.2 on the marks it reads change nothing.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@cache
def _scope(file: str) -> str:
    """What is not to be split: a test file, and all files with tests of Ray as one."""
    path = ROOT / file
    return "ray" if path.is_file() and "mark.ray" in path.read_text() else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _scope(item.nodeid.split("::")[0]) != "ray")  # the longest unit first, the rest as they were


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid.split("::")[0])

    config.option.loadscopereorder = False  # it would put the files with the most tests first, not the longest
    return ByFile(config, log)
