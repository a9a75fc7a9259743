"""Compiles every Triton kernel for a GPU that is not there and prints what the assembler says of each, as JSON lines.

    python -m tests.helpers.triton_compile 90 bfloat16

A stand-in for the driver names the target; a call of a kernel compiles it, down to machine code, instead of launching it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

COMPILED: dict[str, Any] = {}


class AbsentGpu(DriverBase):
    """Answers what compiling asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> None:
        return None

    def get_device_interface(self) -> None:
        return None


def compile_only(kernel: JITFunction, grid: Any) -> Any:
    def run(*args: Any, **options: Any) -> None:
        made = kernel.warmup(*args, grid=grid, **options)
        COMPILED.setdefault(made.hash, made)

    return run


def call_everything(dtype: torch.dtype) -> None:
    """Every public function, both layouts and paths, forward and backward, at MobileMoE-S's sizes with four experts."""
    import kernels.triton as kt
    from kernels.triton import grouped_gemm, permute, rows, w4_grouped, w4_matvec
    from tests.helpers.triton_inputs import draw_experts

    for module in (grouped_gemm, permute, rows, w4_grouped, w4_matvec):
        module.check_tensors = lambda **tensors: None  # type: ignore[attr-defined]
    for total in (16, 2048):  # the smallest and the largest tiles of the tables
        x, weight = torch.zeros(total, 768, dtype=dtype), torch.zeros(4, 768, 768, dtype=dtype)
        kt.grouped_linear(x.requires_grad_(), weight.requires_grad_(), torch.full((4,), total // 4)).sum().backward()
    ids, mix, x = torch.zeros(128, 4, dtype=torch.int64), torch.zeros(128, 4), torch.zeros(128, 768, dtype=dtype)
    plan = kt.plan_dropless(ids, 4)
    kt.combine_rows(kt.gather_rows(x.requires_grad_(), plan), mix.clone().requires_grad_(), plan).sum().backward()
    for axis in ("input", "output"):
        gate_up, down = draw_experts(4, 768, 768, axis), draw_experts(4, 384, 768, axis)
        for layer in (kt.moe_w4a16, kt.moe_w4a8):
            for path in ("decode", "prefill"):
                layer(x.detach(), ids, mix, gate_up, down, path=path)


def facts(made: Any) -> dict[str, Any]:
    """Registers, spills and shared memory of a compiled kernel, and which tensor-core instructions it uses."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {told.stdout}{told.stderr}")
    ptx = made.asm["ptx"]
    return {
        "kernel": made.name, "registers": int(found[1]), "stack_bytes": int(found[2]),
        "shared_bytes": made.metadata.shared, "warps": made.metadata.num_warps, "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"), "int8_mma": ptx.count(".s8.s8"), "async_copies": ptx.count("cp.async.c"),
    }  # fmt: skip


if __name__ == "__main__":
    driver.set_active(AbsentGpu(int(sys.argv[1])))
    JITFunction.__getitem__ = compile_only
    call_everything(getattr(torch, sys.argv[2]))
    for made in COMPILED.values():
        sys.stdout.write(json.dumps(facts(made)) + "\n")
