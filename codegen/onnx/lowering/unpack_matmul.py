"""One packed matmul as several again, for prefill.

Gate and up are one matmul, as are an encoder's queries, keys and values, since each costs a start, which decode feels.
Prefill feels the Split behind it, which writes all channels a second time. The rows of a weight's codes lie one after
another, so the weight of an unpacked matmul is the same bytes from a later one on, and takes no room. Each matmul
quantizes x by nodes of its own, which ONNX Runtime makes one again (common subexpressions).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import onnx_ir as ir
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.constants import Constants, row_range
from qcompile.codegen.onnx.lowering.graph_edits import name_after
from qcompile.codegen.onnx.lowering.op_inputs import DOMAIN, DualLinear


def unpack_matmuls(graph: ir.Graph) -> None:
    """In place, a DualLinear for each output of a Split of channels that alone reads a DualLinear without a bias."""
    for split in [node for node in graph if node.op_type == "Split"]:
        packed, rank = split.inputs[0].producer(), len(split.outputs[0].shape or ())
        if packed is None or packed.op_type != "DualLinear" or DualLinear.of(packed).bias is not None:
            continue
        is_read_elsewhere = len(split.inputs[0].uses()) > 1 or split.inputs[0].is_graph_output()
        if not is_read_elsewhere and split.attributes.get_int("axis", 0) in (-1, rank - 1):
            _unpack(packed, split)


def _unpack(packed: ir.Node, split: ir.Node) -> None:
    graph, dual, n = packed.graph, DualLinear.of(packed), packed.attributes["N"].as_int()
    constants, nodes, outputs = Constants(graph), list[ir.Node](), list[ir.Value]()
    sizes = _sizes(split, n)
    for first, count in zip(accumulate([0, *sizes]), sizes, strict=False):
        tape = Tape()
        ends = [constants.int64(first), constants.int64(first + count), constants.int64(0)]
        rows = replace(
            dual,
            codes=row_range(dual.codes, first, count),
            scales=tape.op("Slice", [dual.scales, *ends]),
            zero_points=dual.zero_points and row_range(dual.zero_points, first, count),
            row_scale=row_range(dual.row_scale, first, count),
        )
        sizes_of_rows = {**packed.attributes, "N": ir.AttrInt64("N", count)}
        outputs.append(tape.op("DualLinear", rows.as_list(), sizes_of_rows, domain=DOMAIN))
        name_after(tape.nodes, f"{packed.name}/{first}")
        nodes += tape.nodes
    ir.convenience.replace_nodes_and_values(graph, packed, [split, packed], nodes, split.outputs, outputs)


def _sizes(split: ir.Node, n: int) -> list[int]:
    """Channels of each output of a Split of n."""
    if len(split.inputs) > 1:
        return [int(size) for size in split.inputs[1].const_value.numpy()]
    each = -(-n // len(split.outputs))  # all alike but the last
    return [min(each, n - first) for first in range(0, n, each)]
