"""The roofline of this machine: bytes read and int8 multiply-adds a second, both measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch


def bandwidth() -> float:
    """Bytes a second that all cores read from memory together."""
    x = torch.ones(2**28 // 4)
    return x.nbytes / best(lambda: float(x.sum()))


def int8_rate(kind: str, size: int = 1536) -> float:
    """Multiply-adds a second of ONNX Runtime's int8 matmul on all cores.

    Args:
        kind: of the weight, "s8" or "u8"; activations are u8.
        size: of the square matrices, which are zeros: their sums of s8 are correct on every processor.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    shape = (size, size)
    a, y = (helper.make_tensor_value_info(n, k, shape) for n, k in (("a", TensorProto.UINT8), ("y", TensorProto.INT32)))
    weight = numpy_helper.from_array(np.zeros(shape, np.int8 if kind == "s8" else np.uint8), "b")
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "rate", [a], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {"a": np.zeros(shape, np.uint8)}
    return size**3 / best(lambda: session.run(None, feeds))


def best(run: Callable[[], object], times: int = 9) -> float:
    """The shortest of some runs, in seconds: a bound is what nothing disturbed."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
