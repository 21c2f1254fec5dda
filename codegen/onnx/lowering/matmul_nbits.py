"""Quantized products in nodes that a runtime has; written after the export.

Three nodes of our own stand in an exported graph, and none in a file:

    Int8Linear      an int8 weight: products in int8 (matmul_integer.py), whatever the number of rows
    DualLinear      a dual-grained weight s_row s1 (q - z), |s1 (q - z)| <= 127 (DGQ, arXiv:2310.04836; QoQ,
                    arXiv:2405.04532): int4 in groups and int8 in a row at once, so there are two ways to multiply
                        few rows    MatMulNBits on the int4 codes: decoding waits for memory, which holds 4 bits
                        many rows   products in int8 on s1 (q - z), which the processor multiplies directly
    BlockedLinear   of a portable file: DequantizeLinear and MatMul, which ONNX Runtime makes one MatMulNBits again

The file holds the 4-bit codes, s_row and s1 once (compact_scales.py): s1 (q - z) is computed from the same bytes, which
ONNX Runtime does when it opens the file (constant folding). A decoder becomes one `If` on its number of tokens around
the whole graph, whose two branches share all weights; an `If` on that around every product would cost a frame each.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.codegen.onnx.lowering.initializers import Stored
from qcompile.codegen.onnx.lowering.int8_kv_attention import Lengths, by_length, is_coded, lengths
from qcompile.codegen.onnx.lowering.matmul_integer import Int8Product, IntegerWeight, exactness
from qcompile.codegen.onnx.lowering.node_builder import FEW, Steps, attributes_of, every_node
from qcompile.codegen.onnx.lowering.unpack_matmul import parted

Way = Literal["few", "many"]

# Norms whose further outputs (mean, inverse deviation, the sum) cost time where nobody reads them.
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


def is_dual(model: onnx.ModelProto) -> bool:
    """Whether a graph has products with two ways to multiply."""
    return any(node.op_type == "DualLinear" for node in model.graph.node)


def one_way(model: onnx.ModelProto, way: Way, portable: bool = False) -> onnx.ModelProto:
    """A copy in which every product is multiplied in one way; portable: by operators of the standard.

    An attention over int8 codes goes by the number of tokens (int8_kv_attention.py).
    """
    found = copy.deepcopy(model)
    writer = _Writer(found.graph, portable)
    ahead, nodes = writer.nodes(way)
    weights = writer.int8_weights(nodes, way)
    del found.graph.value_info[:]  # names of free sizes that only the exporter knew
    _replace(found.graph.node, ahead + weights + writer.lowered(nodes, way, any_length=True))
    _drop_unread(found.graph)
    return found


def by_tokens(model: onnx.ModelProto, few: int = FEW) -> onnx.ModelProto:
    """A copy that multiplies up to `few` tokens (rows times length of its first input) by 4-bit codes, more by int8."""
    found = copy.deepcopy(model)
    graph, writer = found.graph, _Writer(found.graph)
    (_, by_few), (ahead, by_many) = writer.nodes("few"), writer.nodes("many")
    weights = writer.int8_weights(by_many)
    branches: dict[str, Any] = {
        "then_branch": _branch(graph, writer.lowered(by_few, "few", any_length=False), "few"),
        "else_branch": _branch(graph, writer.lowered(by_many, "many", any_length=True), "many"),
    }
    do = Steps("choice")
    tokens = do("tokens", "Size", graph.input[0].name)
    is_few = do("few", "LessOrEqual", tokens, writer.stored.constant(np.array(few, np.int64)))
    outputs = [output.name for output in graph.output]
    choice = helper.make_node("If", [is_few], outputs, name="tokens_few_or_many", **branches)
    del graph.value_info[:]  # they describe values that are inside the branches now
    _replace(graph.node, [*ahead, *weights, *do.nodes, choice])
    _drop_unread(graph)
    return found


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Without weights that no node reads any more: those read as uint4 only, sums where the operators do without."""
    read = {name for node in every_node(graph.node) for name in node.input} | {output.name for output in graph.output}
    _replace(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])


def _replace(held: Any, parts: Iterable[Any]) -> None:
    new = list(parts)
    del held[:]
    held.extend(new)


def _branch(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], way: Way) -> onnx.GraphProto:
    """The nodes as a graph of its own that reads weights and inputs from outside."""
    made = {name for node in nodes for name in node.output if name}

    def inside(name: str) -> str:
        return f"{way}/{name}" if name in made else name

    for node in every_node(nodes):
        node.name = node.name and f"{way}/{node.name}"
        node.input[:] = [inside(name) for name in node.input]
        node.output[:] = [inside(name) for name in node.output]
    outputs = copy.deepcopy(list(graph.output))
    for output in outputs:
        output.name = inside(output.name)
    return helper.make_graph(nodes, way, [], outputs)


class _Writer:
    """Nodes and constants for the products of one graph."""

    def __init__(self, graph: onnx.GraphProto, portable: bool = False) -> None:
        self.graph, self.portable, self.stored = graph, portable, Stored(graph)
        self.read = {name for node in every_node(graph.node) for name in node.input} | {o.name for o in graph.output}
        # Names of the parts of a weight -> the int8 weight computed from them.
        self.int8: dict[tuple[str, ...], IntegerWeight] = {}

    def nodes(self, way: Way) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """Of the graph, to multiply in one way: those that compute with nothing but weights, and all others."""
        nodes = list(self.graph.node)
        if way == "many":
            nodes = parted(nodes, self.graph, self.stored)
        known = {"", *(tensor.name for tensor in self.graph.initializer)}
        found: tuple[list[onnx.NodeProto], list[onnx.NodeProto]] = [], []
        for node in nodes:
            nested = any(attribute.type == onnx.AttributeProto.GRAPH for attribute in node.attribute)
            if node.input and not nested and known.issuperset(node.input):
                known.update(node.output)
                found[0].append(node)
            else:
                found[1].append(node)
        return found

    def lowered(self, nodes: list[onnx.NodeProto], way: Way, *, any_length: bool) -> list[onnx.NodeProto]:
        """Copies of the nodes, products of int8 activations in nodes of ONNX Runtime.

        any_length: whether texts of more than a few tokens come this way.
        """
        found: list[onnx.NodeProto] = []
        known: Lengths | None = None
        for node in nodes:
            if any_length and is_coded(node):
                if known is None:
                    known = lengths(self.graph.input[0].name, node, self.stored.constant)
                    found += known.nodes
                found.append(by_length(node, known, self.stored.constant))
            elif node.op_type == "Int8Linear":
                found += self._product(node, node.input[0], self.int8[_int8_weight(node)], list(node.input[4:]))
            elif node.op_type == "BlockedLinear":
                found += self._dequantized(node)
            elif node.op_type == "DualLinear" and way == "many":
                found += self._product(node, node.input[0], self.int8[_dual_weight(node)], list(node.input[5:]))
            elif node.op_type == "DualLinear":
                found.append(self._by_codes(node))
            else:
                found.append(copy.deepcopy(node))
                if node.op_type in _NORMS:
                    found[-1].output[:] = self._wanted(list(node.output))
        return found

    def _wanted(self, outputs: list[str]) -> list[str]:
        """Outputs without the names of those that nobody reads; the first is never left out."""
        named = [out if i == 0 or out in self.read else "" for i, out in enumerate(outputs)]
        while not named[-1]:
            named.pop()
        return named

    def _by_codes(self, node: onnx.NodeProto) -> onnx.NodeProto:
        codes, scales, zeros, _ = _dual_weight(node)
        sizes = attributes_of(node)
        del sizes["per_row"]
        inputs, outputs = [node.input[0], codes, scales, zeros, "", *node.input[5:]], list(node.output)
        while not inputs[-1]:
            inputs.pop()
        sizes |= dict(name=node.name, domain="com.microsoft", accuracy_level=1)
        return helper.make_node("MatMulNBits", inputs, outputs, **sizes)

    def _product(self, node: onnx.NodeProto, x: str, weight: IntegerWeight, bias: list[str]) -> list[onnx.NodeProto]:
        do = Steps(node.name)
        Int8Product(do, self.stored.constant, self.portable).multiply(x, weight, bool(attributes_of(node)["per_row"]))
        return self._with_bias(do, bias, node)

    def _dequantized(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """x @ DequantizeLinear(codes [K, N]) + bias."""
        x, codes, scales, zeros, *bias = node.input
        sizes, (blocks, n) = attributes_of(node), self.stored.weights[scales].dims
        kind = TensorProto.UINT4 if sizes["bits"] == 4 else TensorProto.UINT8
        codes, zeros = self.stored.seen(codes, [sizes["K"], n], kind), self.stored.seen(zeros, [blocks, n], kind)
        do = Steps(node.name)
        weight = do("weight", "DequantizeLinear", codes, scales, zeros, axis=0, block_size=sizes["block_size"])
        do("product", "MatMul", x, weight)
        return self._with_bias(do, bias, node)

    def _with_bias(self, do: Steps, bias: list[str], node: onnx.NodeProto) -> list[onnx.NodeProto]:
        for name in filter(None, bias):  # one, none, or one left out
            do("biased", "Add", do.nodes[-1].output[0], name)
        return do.ending(node.output[0])

    def int8_weights(self, nodes: list[onnx.NodeProto], way: Way = "many") -> list[onnx.NodeProto]:
        """Nodes that make the int8 weights of products by that way, and know the processor."""
        found: list[onnx.NodeProto] = []
        for node in nodes:
            if node.op_type == "Int8Linear" and (key := _int8_weight(node)) not in self.int8:
                self.int8[key] = IntegerWeight(self.stored.weights[key[0]].dims[0], *key)
            elif node.op_type == "DualLinear" and way == "many" and (key := _dual_weight(node)) not in self.int8:
                do = Steps(node.name)
                self.int8[key] = self._from_codes(do, node)
                found += do.nodes
        return [*exactness(self.stored.constant), *found] if self.int8 and not self.portable else found

    def _from_codes(self, do: Steps, node: onnx.NodeProto) -> IntegerWeight:
        """s1 (q - z) [K, N] of a dual weight, computed from its 4-bit codes [N, blocks, block / 2].

        In as few steps as there can be: ONNX Runtime keeps all of them until the last weight of a model is made.
        """
        codes, scales, zeros, row = _dual_weight(node)
        stored, whole = self.stored, self.stored.whole
        sizes = attributes_of(node)
        n, k, block = sizes["N"], sizes["K"], sizes["block_size"]
        blocks = -(-k // block)
        s8: dict[str, Any] = dict(to=TensorProto.INT8)
        last, first = whole(-1), whole(0)
        q = do("q", "Cast", stored.seen(codes, [n, blocks, block]), **s8)
        if zeros:
            padded = do("padded", "Cast", stored.seen(zeros, [n, blocks + blocks % 2]), **s8)
            flat = do("flat", "Slice", padded, first, whole(blocks), whole(1))
            z = do("z", "Unsqueeze", flat, last)
        else:
            z = stored.constant(np.array(2 ** (sizes["bits"] - 1), np.int8))
        ratio = do("ratio", "Div", scales, do("rows", "Unsqueeze", row, last))
        s1 = do("s1", "Cast", do("whole", "Round", ratio), **s8)
        product = do("blocks", "Mul", do("levels", "Sub", q, z), do("steps", "Unsqueeze", s1, last))
        lines = do("lines", "Reshape", product, whole(n, blocks * block))
        columns = do("columns", "Transpose", lines, perm=[1, 0])
        if blocks * block > k:
            columns = do("inside", "Slice", columns, first, whole(k), first)
        return IntegerWeight(k, columns, row)


def _int8_weight(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names of codes, scales and, where activations have zero points, sums of an Int8Linear."""
    return tuple(node.input[1:4])


def _dual_weight(node: onnx.NodeProto) -> tuple[str, ...]:
    """Names of codes, scales, zero points ("": none) and row scales of a DualLinear."""
    return tuple(node.input[1:5])
