"""Scales of dual-grained weights in a quarter of their bytes: an int8 for a group and a float for a row.

The operators read s0 s1 as float32 [N, blocks]; a file that holds s1 as int8 and s0 [N] says the same in 1 byte instead
of 4, which is an eighth of a file with blocks of 32. ONNX Runtime multiplies them when it opens it (constant folding).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def split_scales(model: ir.Model) -> None:
    """Split the scales of every DualLinear, in place, for all that read them."""
    done: set[str] = set()
    for node in list(model.graph):
        if node.op_type == "DualLinear":
            _, _, scales, _, row, *_ = node.inputs
            assert scales is not None and row is not None and scales.name is not None
            if scales.name not in done and scales.const_value is not None and row.const_value is not None:
                done.add(_split(model.graph, scales, row))


def _split(graph: ir.Graph, scales: ir.Value, row: ir.Value) -> str:
    """The name of what now makes the scales."""
    assert scales.const_value is not None and row.const_value is not None
    numbers, rows = scales.const_value.numpy(), row.const_value.numpy()[:, None]
    steps = np.rint(numbers / rows).astype(np.int8)
    if not np.array_equal(steps.astype(np.float32) * rows, numbers):
        raise ValueError(f"{scales.name}: not whole multiples of the row's scale")
    name = f"qcompile/{scales.name}"
    held = [_constant(graph, f"{name}/steps", steps), _constant(graph, f"{name}/axis", np.array([1]))]
    cast = ir.node("Cast", [held[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/cast")
    rows_of = ir.node("Unsqueeze", [row, held[1]], name=f"{name}/rows")
    product = ir.node("Mul", [cast.outputs[0], rows_of.outputs[0]], name=f"{name}/scales")
    graph.insert_before(graph[0], [cast, rows_of, product])
    made = product.outputs[0]
    made.type, made.shape = scales.type, scales.shape
    ir.convenience.replace_all_uses_with(scales, made)
    del graph.initializers[str(scales.name)]
    made.name = f"{name}/scales"
    return made.name


def _constant(graph: ir.Graph, name: str, numbers: np.ndarray) -> ir.Value:
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
