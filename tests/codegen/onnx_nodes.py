"""What the nodes of a file are, each int8 product counted once though it is written for two kinds of processor."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

import onnx

from qcompile.codegen.onnx.lower_int8 import EXACT


def operators(nodes: Iterable[onnx.NodeProto]) -> collections.Counter[str]:
    """How many of each operator; a choice of processor counts as the product that both its branches hold."""
    counts: collections.Counter[str] = collections.Counter()
    for node in nodes:
        if node.op_type == "If" and node.input[0].endswith(EXACT):
            products = [[n for n in branch.g.node if "MatMul" in n.op_type] for branch in node.attribute]
            assert [[n.op_type for n in found] for found in products] == [["MatMulIntegerToFloat"]] * 2
            counts["MatMulIntegerToFloat"] += 1
        else:
            counts[node.op_type] += 1
    return counts


def every_node(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, and those of the branches inside them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g)
