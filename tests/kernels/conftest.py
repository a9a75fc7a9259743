"""How the tests of Triton kernels run in its interpreter: in a process of their own, one for each file.

TRITON_INTERPRET is read when triton is first imported, and decides for good whether its functions are compiled or
interpreted. Other tests of a worker import triton without it (torchao does), and would find it set. So a test that needs the
interpreter is handed, with the others of its file, to a pytest with that variable, and its outcome there is its outcome.
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
Outcomes = dict[str, tuple[str, str]]
"""Of each test of a file, by name: passed, skipped or failed, and why."""
_OUTCOMES = pytest.StashKey[dict[Path, Outcomes]]()


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


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not _interpreted(pyfuncitem) or IN_CHILD in os.environ:
        return None
    files = pyfuncitem.session.stash.setdefault(_OUTCOMES, {})
    if pyfuncitem.path not in files:
        mine = [item.nodeid for item in pyfuncitem.session.items
                if isinstance(item, pytest.Function) and item.path == pyfuncitem.path and _interpreted(item)]  # fmt: skip
        files[pyfuncitem.path] = _run(mine, pyfuncitem.config.rootpath)
    outcome, why = files[pyfuncitem.path].get(pyfuncitem.name, ("failed", "the interpreter's process did not report this test"))
    if outcome == "skipped":
        pytest.skip(why)
    if outcome == "failed":
        pytest.fail(why, pytrace=False)
    return True


def _interpreted(item: pytest.Function) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "interpreter" in item.fixturenames or parameters.get("device") == "interpreter"


def _run(names: list[str], root: Path) -> Outcomes:
    unwanted = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")
    environment = {key: value for key, value in os.environ.items() if key not in unwanted and "XDIST" not in key}
    environment |= {"TRITON_INTERPRET": "1", IN_CHILD: "1"}
    with tempfile.TemporaryDirectory(prefix="triton_tests_") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", f"--junitxml={report}", *names]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if not report.exists():
            pytest.fail(f"the interpreter's process ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        return {case.get("name", ""): _outcome(case) for case in ElementTree.parse(report).iter("testcase")}


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    for child in case:
        if child.tag == "skipped":
            return "skipped", child.get("message", "")
        if child.tag in ("failure", "error"):
            return "failed", child.text or child.get("message", "")
    return "passed", ""
