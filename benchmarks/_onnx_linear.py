"""ONNX Runtime's MatMulNBits on one matrix, one thread: `_onnx_linear.py FOLDER COUNT REPEATS`.

Runs in the peer's environment. FOLDER has matrix.npz and x_COUNT.npy (`linear.py`). INT4 in blocks of 32,
`accuracy_level` 4: activations rounded to INT8, its fastest way. Writes y_COUNT.npy; prints {"seconds": [...],
"call": [...]}, the latter of a graph that hands back one number.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper


def main() -> None:
    folder = Path(sys.argv[1])
    count, repeats = map(int, sys.argv[2:4])
    matrix, x = np.load(folder / "matrix.npz"), np.load(folder / f"x_{count}.npy")
    n, k = matrix["codes"].shape
    codes = (matrix["codes"] + 8).astype(np.uint8)  # without zero points a code stands for itself less 8
    weights = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(n, k // 32, 16)
    scales = matrix["scales"].astype(np.float32).reshape(-1)
    product = session(
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=32,
                         accuracy_level=4),
        x.shape, (count, n),
        helper.make_tensor("w", TensorProto.UINT8, weights.shape, weights.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
    )  # fmt: skip
    nothing = session(
        helper.make_node("Slice", ["x", "from", "to"], ["y"]), x.shape, (1, 1),
        helper.make_tensor("from", TensorProto.INT64, [2], [0, 0]),
        helper.make_tensor("to", TensorProto.INT64, [2], [1, 1]),
    )  # fmt: skip
    np.save(folder / f"y_{count}.npy", product.run(None, {"x": x})[0])
    sys.stdout.write(json.dumps({"seconds": timed(product, x, repeats), "call": timed(nothing, x, repeats)}) + "\n")


def session(node: Any, shape: tuple[int, ...], result: tuple[int, ...], *constants: Any) -> Any:
    graph = helper.make_graph(
        [node], "linear", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, result)], list(constants),
    )  # fmt: skip
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions)
    model.ir_version = 9
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def timed(session: Any, x: Any, repeats: int) -> list[float]:
    seconds = []
    for repeat in range(repeats + 5):
        start = time.perf_counter()
        session.run(None, {"x": x})
        if repeat >= 5:
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
