"""How the tests of Triton kernels run in its interpreter: in a process of their own.

TRITON_INTERPRET is read when triton is first imported, and decides for good whether its functions are compiled or
interpreted. Other tests of a worker import triton without it (torchao does), and would find it set. So all tests that need the
interpreter are handed to a pytest with that variable, and their outcomes there are their outcomes. Under pytest-xdist,
which gives each file to one worker, that is a process for each file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

IN_CHILD = "POCKETFORGE_TRITON_TESTS"
Name = tuple[str, str]
"""Of a test: its module's last name and its own."""
Outcomes = dict[Name, tuple[str, str]]
"""Passed, skipped or failed, and why."""
_OUTCOMES = pytest.StashKey[Outcomes]()


@pytest.fixture(params=["interpreter", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a kernel runs: on CPU tensors in the interpreter, and once more on a GPU."""
    _need_triton()
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: Triton kernels are checked in its interpreter only")
    return torch.device("cpu" if request.param == "interpreter" else "cuda")


@pytest.fixture
def interpreter() -> torch.device:
    """For what is about the interpreter itself, or is the same everywhere."""
    _need_triton()
    return torch.device("cpu")


def _need_triton() -> None:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install -c constraints.txt '.[triton]'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _interpreted(item) and IN_CHILD not in os.environ:
            item.add_marker(pytest.mark.timeout(1200))  # the first waits for all of them


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not _interpreted(pyfuncitem) or IN_CHILD in os.environ:
        return None
    outcomes = pyfuncitem.session.stash.setdefault(_OUTCOMES, {})
    name = (pyfuncitem.path.stem, pyfuncitem.name)
    if name not in outcomes:
        one_file = "PYTEST_XDIST_WORKER" in os.environ
        together = [item for item in pyfuncitem.session.items
                    if _interpreted(item) and (item.path == pyfuncitem.path or not one_file)]  # fmt: skip
        outcomes |= _run(together, pyfuncitem.config.rootpath)
    outcome, why = outcomes[name]
    if outcome == "skipped":
        pytest.skip(why)
    if outcome == "failed":
        pytest.fail(why, pytrace=False)
    return True


def _interpreted(item: pytest.Item) -> bool:
    if not isinstance(item, pytest.Function) or not item.path.stem.startswith("test_triton_"):
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "interpreter" in item.fixturenames or parameters.get("device") == "interpreter"


def _run(items: list[pytest.Item], root: Path) -> Outcomes:
    unwanted = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted and "XDIST" not in key}
    environment |= {"TRITON_INTERPRET": "1", IN_CHILD: "1"}
    with tempfile.TemporaryDirectory(prefix="triton_tests_") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [item.nodeid for item in items]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        told = f"the interpreter's process ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        outcomes = {(item.path.stem, item.name): ("failed", told) for item in items}
        for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
            outcomes[case.get("classname", "").rpartition(".")[2], case.get("name", "")] = _outcome(case)
        return outcomes


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag == "skipped":
            return "skipped", child.get("message", "")
        if child.tag in ("failure", "error"):
            return "failed", child.text or child.get("message", "")
    return "passed", ""
