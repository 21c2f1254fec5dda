"""Scales of dual-grained weights in a quarter of their bytes: an int8 per group and a float per row.

The operators read s0 s1 as float32 [N, blocks]; a file that holds s1 as int8 and s0 [N] says the same in 1 byte instead
of 4, which is an eighth of a file with blocks of 32. ONNX Runtime multiplies them when it opens it (constant folding).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import add_initializer
from qcompile.codegen.onnx.lowering.graph_edits import name_after
from qcompile.codegen.onnx.lowering.op_inputs import DOMAIN, DualLinear


def compact_scales(model: ir.Model) -> None:
    """Store the scales of every DualLinear as int8 and row scales, in place, for all nodes that read them.

    Raises:
        ValueError: scales that are not whole multiples of their row's scale.
    """
    for node in list(model.graph):
        if node.op_type == "DualLinear" and DualLinear.of(node).scales.is_initializer():
            _compact(model.graph, DualLinear.of(node))


def _compact(graph: ir.Graph, dual: DualLinear) -> None:
    scales, row_scale = dual.scales, dual.row_scale.const_value.numpy()[:, None]
    values = scales.const_value.numpy()
    s1 = np.rint(values / row_scale).astype(np.int8)
    if not np.array_equal(s1.astype(np.float32) * row_scale, values):
        raise ValueError(f"{scales.name}: scales are not whole multiples of their row's scale")
    tape, scope = Tape(), f"{DOMAIN}/{scales.name}"
    groups = add_initializer(graph, ir.tensor(s1, name=f"{scope}/group_scales"))
    axis = add_initializer(graph, ir.tensor(np.array([1]), name=f"{scope}/axis"))
    rows = tape.op("Unsqueeze", [dual.row_scale, axis])
    product = tape.op("Mul", [tape.op("Cast", [groups], {"to": ir.DataType.FLOAT}), rows])
    name_after(tape.nodes, scope)
    product.type, product.shape = scales.type, scales.shape
    graph.insert_before(graph[0], tape.nodes)
    scales.replace_all_uses_with(product)
    del graph.initializers[scales.name]
