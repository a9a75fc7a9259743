"""ExecuTorch's XNNPACK on one matrix, one thread: `_executorch_linear.py FOLDER COUNT REPEATS`.

Runs in the peer's environment. FOLDER has matrix.npz and x_COUNT.npy (`linear.py`). A linear layer of torchao's INT4
tensor, groups of 32, with INT8 activations, one scale and zero point a token, is lowered to a program once and kept in
FOLDER. Activations are read where they lie and the result is not copied out, which is its fastest way. Writes
y_COUNT.npy; prints {"seconds": [...], "call": [...]}, the latter of a program that hands back one number.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


def main() -> None:
    folder = Path(sys.argv[1])
    count, repeats = map(int, sys.argv[2:4])
    x = torch.from_numpy(np.load(folder / f"x_{count}.npy"))
    programs = {name: folder / f"{name}_{count}.pte" for name in ("product", "nothing")}
    if not programs["product"].exists():
        lower(linear(np.load(folder / "matrix.npz")), x, programs["product"])
        lower(Nothing(), x, programs["nothing"])
    from executorch.extension.pybindings import portable_lib as runtime

    runtime._unsafe_reset_threadpool(1)
    if (threads := runtime._threadpool_get_thread_count()) != 1:
        sys.exit(f"ExecuTorch has {threads} threads after being asked for one")
    product, nothing = (runtime._load_for_executorch(str(path)) for path in programs.values())
    np.save(folder / f"y_{count}.npy", product.forward([x])[0].numpy())
    found = {"seconds": timed(product, x, repeats), "call": timed(nothing, x, repeats)}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1, :1].relu()


def linear(matrix: Any) -> nn.Module:
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    codes, scales = torch.from_numpy(matrix["codes"]), torch.from_numpy(matrix["scales"]).float()
    layer = nn.Linear(codes.shape[1], codes.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(IntxUnpackedToInt8Tensor(
        qdata=codes, scale=scales, zero_point=torch.zeros_like(scales, dtype=torch.int8), block_size=(1, 32),
        target_dtype=torch.int4, dtype=torch.float32,
        activation_quantization=IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    ), requires_grad=False)  # fmt: skip
    return layer


def lower(module: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Exits unless XNNPACK takes the whole module."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    with torch.no_grad():
        edge = to_edge_transform_and_lower(
            torch.export.export(module.eval(), (x,)),
            partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
        )
        left = [str(node.target) for node in edge.exported_program().graph.nodes if node.op == "call_function"]
        if len([name for name in left if "call_delegate" in name]) != 1 or len(left) > 2:  # the call, its result
            sys.exit(f"XNNPACK did not take all of {type(module).__name__}: {left}")
        planned = MemoryPlanningPass(alloc_graph_input=False)
        lowered = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planned))
    with path.open("wb") as file:
        lowered.write_to_file(file)


def timed(program: Any, x: torch.Tensor, repeats: int) -> list[float]:
    seconds = []
    for repeat in range(repeats + 5):
        start = time.perf_counter()
        program.forward([x], clone_outputs=False)
        if repeat >= 5:
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
