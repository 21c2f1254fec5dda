"""One product whose channels part again, as products of their own, where the rows are many.

Gate and up are one product, since each costs a start, which few rows feel; so are an encoder's queries, keys and
values. Many rows feel the Split behind it, which writes all channels a second time. The rows of a weight's codes lie
one after another, so the weight of a part is the same bytes from a later one on, and takes no room. Each part rounds x
by nodes of its own, which ONNX Runtime makes one again (common subexpressions).
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import accumulate

import onnx
from onnx import numpy_helper

from qcompile.codegen.onnx.lowering.initializers import Stored
from qcompile.codegen.onnx.lowering.node_builder import Steps, attributes_of, every_node


def parted(nodes: list[onnx.NodeProto], graph: onnx.GraphProto, stored: Stored) -> list[onnx.NodeProto]:
    """The nodes, with a DualLinear for each part of one that nothing but a Split of its channels reads."""
    reads = Counter(name for node in every_node(nodes) for name in node.input)
    reads.update(output.name for output in graph.output)
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in (*graph.value_info, *graph.output)}
    made = {out: node for node in nodes for out in node.output}
    parts: dict[str, list[onnx.NodeProto]] = {}  # of a product, by the name of what it makes
    for node in nodes:
        whole = made.get(node.input[0]) if node.op_type == "Split" else None
        if whole is None or whole.op_type != "DualLinear" or any(whole.input[5:]) or reads[node.input[0]] > 1:
            continue
        if attributes_of(node).get("axis", 0) in (-1, ranks.get(node.output[0], 0) - 1):
            parts[node.input[0]] = _parts(whole, node, stored)
    found: list[onnx.NodeProto] = []
    for node in nodes:
        if node.op_type == "Split" and node.input[0] in parts:
            continue
        found += parts.get(node.output[0], [node])
    return found


def _parts(whole: onnx.NodeProto, split: onnx.NodeProto, stored: Stored) -> list[onnx.NodeProto]:
    """A product for each output of a Split, each behind the nodes that take its rows of the scales."""
    x, codes, scales, zeros, row, *_ = whole.input
    n = attributes_of(whole)["N"]
    if len(split.input) > 1:
        sizes = [int(size) for size in numpy_helper.to_array(stored.weights[split.input[1]])]
    else:  # all alike but the last
        each = -(-n // len(split.output))
        sizes = [min(each, n - first) for first in range(0, n, each)]
    found: list[onnx.NodeProto] = []
    for out, first, count in zip(split.output, accumulate([0, *sizes]), sizes, strict=False):
        do = Steps(f"{whole.name}/{first}")
        ends = stored.whole(first), stored.whole(first + count), stored.whole(0)
        of_rows = [stored.rows(codes, first, count), do("scales", "Slice", scales, *ends)]
        of_rows.append(stored.rows(zeros, first, count) if zeros else "")
        part = copy.deepcopy(whole)
        part.name, part.input[:], part.output[:] = do.name, [x, *of_rows, stored.rows(row, first, count)], [out]
        for attribute in part.attribute:
            if attribute.name == "N":
                attribute.i = count
        found += [*do.nodes, part]
    return found
