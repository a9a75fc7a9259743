"""ONNX Runtime's MatMulNBits on one matrix, one thread: `_onnx_linear.py N K M REPEATS`, in the peer's environment.

INT4 in blocks of 32, `accuracy_level` 4: activations rounded to INT8, its fastest way. Prints {"seconds": [...]}.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper


def main() -> None:
    n, k, m, repeats = map(int, sys.argv[1:5])
    draw = np.random.default_rng(0)
    weights = draw.integers(0, 256, (n, k // 32, 16), dtype=np.uint8)
    scales = np.full(n * k // 32, 0.02, np.float32)
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=32,
                            accuracy_level=4)  # fmt: skip
    graph = helper.make_graph(
        [node], "linear", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [helper.make_tensor("w", TensorProto.UINT8, weights.shape, weights.tobytes(), raw=True),
         helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = {"x": draw.standard_normal((m, k)).astype(np.float32)}
    seconds = []
    for repeat in range(repeats + 5):
        start = time.perf_counter()
        session.run(None, x)
        if repeat >= 5:
            seconds.append(time.perf_counter() - start)
    sys.stdout.write(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
