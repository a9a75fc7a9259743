"""The package of Triton kernels: without triton, with tensors it cannot take, and compiled for GPUs that are not here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "triton"
WITHOUT = "import sys; sys.modules['triton'] = None; "
"""What an environment without triton looks like to an import."""


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_importing_the_package_takes_neither_triton_nor_torch():
    done = python("import sys, kernels.triton; print(sorted({'triton', 'torch'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_only_the_backend_imports_triton():
    """So that what an environment without it is told is told in one place."""
    for path in PACKAGE.glob("*.py"):
        names = {alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)
                 for alias in node.names}  # fmt: skip
        assert path.name == "backend.py" or not any(name.partition(".")[0] == "triton" for name in names), path.name


def test_without_triton_a_kernel_says_what_to_install_and_plain_parts_work():
    done = python(WITHOUT + "from kernels.grouped import _triton; print(_triton()); "
                  "import kernels.triton as kt; kt.PackedExperts; kt.Blocks; kt.grouped_linear")  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: kernels.triton needs the package triton") and "pip install" in last
    assert done.stdout.strip() == "None"  # the product of kernels/grouped.py falls back to torch


def test_an_unknown_name_is_an_attribute_error():
    import kernels.triton as kt

    with pytest.raises(AttributeError, match="kernels.triton has no 'grouped'; it has Blocks, MatvecBlocks"):
        kt.grouped  # noqa: B018


def test_the_benchmark_says_in_one_line_that_there_is_no_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the benchmark would run")
    done = subprocess.run([sys.executable, "benchmarks/triton_moe.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: no CUDA device here; this benchmark measures a GPU: run it where there is one\n"


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_every_public_name_is_there_and_tensors_on_a_cpu_are_refused_outside_of_the_interpreter():
    done = python("import torch, kernels.triton as kt; print(all(getattr(kt, name) for name in kt.__all__)); "
                  "kt.quantize_rows(torch.ones(2, 3))")  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("ValueError: Triton kernels run on a GPU, got tensors on cpu; ")


@needs_triton
def test_every_kernel_compiles_for_an_h100_and_keeps_to_its_registers(tmp_path):
    """Down to machine code, in bf16. The interpreter lets types pass that the compiler refuses, and knows no registers."""
    if not _assembler().exists():
        pytest.skip("this triton brings no NVIDIA assembler")
    command = [sys.executable, "-m", "tests.helpers.triton_compile", "90", "bfloat16"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert {fact["kernel"] for fact in facts} == _kernels()
    for fact in facts:
        assert fact["stack_bytes"] == 0, f"spills: {fact}"
        assert fact["shared_bytes"] <= 227 * 1024
    largest = [fact for fact in facts if fact["kernel"] in ("_grouped_kernel", "_weight_grad_kernel") and fact["warps"] == 8]
    assert len(largest) >= 2 and all(fact["wgmma"] and fact["async_copies"] for fact in largest)
    assert any(fact["int8_mma"] for fact in facts if fact["kernel"] == "_tiles_by_input")


def _assembler() -> Path:
    spec = find_spec("triton")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def _kernels() -> set[str]:
    """Kernels of the package: what is jitted and stores. Functions that they call store nothing."""
    found = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                if "tl.store(" in ast.unparse(node):
                    found.add(node.name)
    return found
