"""Quantized products in nodes that a runtime has; written after the export.

Three nodes of our own stand in an exported graph, and none in a file:

    Int8Linear      an int8 weight: u8 x s8 products, whatever the number of rows
    DualLinear      a dual-grained weight s_row s1 (q - z), |s1 (q - z)| <= 127 (DGQ, arXiv:2310.04836; QoQ,
                    arXiv:2405.04532): int4 in groups and int8 in a row at once, so there are two ways to multiply
                        few rows    MatMulNBits on the int4 codes: decoding waits for memory, which holds 4 bits
                        many rows   u8 x s8 products on s1 (q - z), about twice as fast
    BlockedLinear   of a portable file: DequantizeLinear and MatMul, which ONNX Runtime makes one MatMulNBits again

The file holds the 4-bit codes once: s1 (q - z) is computed from the same bytes, which ONNX Runtime does when
it opens the file (constant folding). A decoder becomes one `If` on its number of tokens around the whole graph,
whose two branches share all weights. (An `If` around every product would cost a frame each; one costs up to 3 %
of a decoded token.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Way = Literal["few", "many"]
DOMAIN = "qcompile"
FEW = 4  # tokens that are multiplied by 4-bit codes; benches/onnx_cpu.py measures both ways

_TINY = 1e-30 / 127  # a step of zero would make 0 / 0 of a row of zeros


def is_dual(model: onnx.ModelProto) -> bool:
    """Whether a graph has products with two ways to multiply."""
    return any(node.op_type == "DualLinear" for node in model.graph.node)


def one_way(model: onnx.ModelProto, way: Way, portable: bool = False) -> onnx.ModelProto:
    """A copy in which every product is multiplied in one way; portable: by operators of the standard."""
    found = copy.deepcopy(model)
    writer = _Writer(found.graph, portable)
    nodes = list(found.graph.node)
    weights = [] if way == "few" else writer.int8_weights(nodes)
    del found.graph.value_info[:]  # names of free sizes that only the exporter knew
    _replace(found.graph.node, weights + writer.lowered(nodes, way))
    _drop_unread(found.graph)
    return found


def by_tokens(model: onnx.ModelProto, few: int = FEW) -> onnx.ModelProto:
    """A copy that multiplies up to `few` tokens (rows times length of its first input) by 4-bit codes, more by int8."""
    found = copy.deepcopy(model)
    graph, writer = found.graph, _Writer(found.graph)
    nodes = list(graph.node)
    weights = writer.int8_weights(nodes)
    tokens, limit = writer.name("tokens"), writer.constant(np.array(few, np.int64))
    outputs = [output.name for output in graph.output]
    branches: dict[str, Any] = {
        f"{side}_branch": _branch(graph, writer.lowered(nodes, way), way)
        for side, way in (("then", "few"), ("else", "many"))
    }
    choice = [
        helper.make_node("Size", [graph.input[0].name], [tokens]),
        helper.make_node("LessOrEqual", [tokens, limit], [writer.name("few")]),
        helper.make_node("If", [writer.name("few")], outputs, name="tokens_few_or_many", **branches),
    ]
    del graph.value_info[:]  # they describe values that are inside the branches now
    _replace(graph.node, weights + choice)
    return found


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Without weights that no node reads any more: those read as uint4 only."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
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

    for node in nodes:
        node.name = f"{way}/{node.name}"
        node.input[:] = [inside(name) for name in node.input]
        node.output[:] = [inside(name) for name in node.output]
    outputs = copy.deepcopy(list(graph.output))
    for output in outputs:
        output.name = inside(output.name)
    return helper.make_graph(nodes, way, [], outputs)


class _Writer:
    """Nodes and constants for the products of one graph."""

    def __init__(self, graph: onnx.GraphProto, portable: bool = False) -> None:
        self.graph, self.portable = graph, portable
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.constants: dict[tuple[str, bytes], str] = {}
        self.int8: dict[str, str] = {}  # codes -> int8 weight [K, N]

    def name(self, *parts: str) -> str:
        return "/".join((DOMAIN, *parts))

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant; equal ones are one."""
        key = (f"{value.dtype}{value.shape}", value.tobytes())
        if key not in self.constants:
            self.constants[key] = self.name(f"constant_{len(self.constants)}")
            self.graph.initializer.append(numpy_helper.from_array(value, self.constants[key]))
        return self.constants[key]

    def lowered(self, nodes: list[onnx.NodeProto], way: Way) -> list[onnx.NodeProto]:
        """Copies of the nodes, products of int8 activations in nodes of ONNX Runtime."""
        found: list[onnx.NodeProto] = []
        for node in nodes:
            if node.op_type == "Int8Linear":
                x, weight, scale, *bias = node.input
                found += self._product(node, x, weight, scale, bias)
            elif node.op_type == "BlockedLinear":
                found += self._dequantized(node)
            elif node.op_type == "DualLinear" and way == "many":
                x, codes, _, _, row, *bias = node.input
                found += self._product(node, x, self.int8[codes], row, bias)
            elif node.op_type == "DualLinear":
                x, codes, scales, zeros, _, *bias = node.input
                sizes = {key: value for key, value in _attributes(node).items() if key != "per_row"}
                found.append(
                    helper.make_node(
                        "MatMulNBits",
                        [x, codes, scales, zeros, "", *bias],
                        list(node.output),
                        name=node.name,
                        domain="com.microsoft",
                        accuracy_level=1,
                        **sizes,
                    )  # fmt: skip
                )
            else:
                found.append(copy.deepcopy(node))
        return found

    def _product(self, node: onnx.NodeProto, x: str, weight: str, scale: str, bias: list[str]) -> list[onnx.NodeProto]:
        """x rounded to u8 around 128 in steps of max|x| / 127, times s8: products of s8 and s8 have a slow path."""
        per_row = bool(_attributes(node)["per_row"])
        inner = {part: self.name(node.name, part) for part in ("size", "peak", "step", "units", "codes", "sums", "y")}
        bias = [name for name in bias if name]
        one, middle = self.constant(np.array(1, np.float32)), self.constant(np.array(128, np.uint8))
        step, out = inner["step"], node.output[0]
        axes = [self.constant(np.array([-1], np.int64))] if per_row else []
        found = [
            helper.make_node("Abs", [x], [inner["size"]]),
            helper.make_node("ReduceMax", [inner["size"], *axes], [inner["peak"]], keepdims=int(per_row)),
            helper.make_node("Mul", [inner["peak"], self.constant(np.array(1 / 127, np.float32))], [inner["y"] + "0"]),
            helper.make_node("Max", [inner["y"] + "0", self.constant(np.array(_TINY, np.float32))], [step]),
        ]
        if per_row:  # the operators take one scale for all rows: divide before, multiply after
            total = inner["sums"] if not bias else inner["y"]
            found += [
                helper.make_node("Div", [x, step], [inner["units"]]),
                helper.make_node("QuantizeLinear", [inner["units"], one, middle], [inner["codes"]]),
                *self._multiplied(inner["codes"], weight, one, scale, middle, inner["sums"]),
                helper.make_node("Mul", [inner["sums"], step], [total if bias else out]),
            ]
        else:
            total = inner["sums"]
            found += [
                helper.make_node("QuantizeLinear", [x, step, middle], [inner["codes"]]),
                *self._multiplied(inner["codes"], weight, step, scale, middle, total if bias else out),
            ]
        if bias:
            found.append(helper.make_node("Add", [total, *bias], [out]))
        for index, made in enumerate(found):
            made.name = f"{node.name}/{index}"
        return found

    def _multiplied(
        self, codes: str, weight: str, step: str, scale: str, middle: str, out: str
    ) -> list[onnx.NodeProto]:
        if not self.portable:
            inputs = [codes, weight, step, scale, middle]
            return [helper.make_node("MatMulIntegerToFloat", inputs, [out], domain="com.microsoft")]
        sums, numbers, scales = (f"{out}/{part}" for part in ("integers", "numbers", "scales"))
        return [
            helper.make_node("MatMulInteger", [codes, weight, middle], [sums]),
            helper.make_node("Cast", [sums], [numbers], to=TensorProto.FLOAT),
            helper.make_node("Mul", [scale, step], [scales]),
            helper.make_node("Mul", [numbers, scales], [out]),
        ]

    def _dequantized(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """x @ DequantizeLinear(codes [K, N]) + bias."""
        x, codes, scales, zeros, *bias = node.input
        sizes, weight, product = _attributes(node), self.name(node.name, "weight"), self.name(node.name, "product")
        blocks, n = self.weights[scales].dims
        kind = TensorProto.UINT4 if sizes["bits"] == 4 else TensorProto.UINT8
        codes, zeros = self._seen(codes, [sizes["K"], n], kind), self._seen(zeros, [blocks, n], kind)
        bias = [name for name in bias if name]
        found = [
            helper.make_node(
                "DequantizeLinear", [codes, scales, zeros], [weight], axis=0, block_size=sizes["block_size"]
            ),
            helper.make_node("MatMul", [x, weight], [product if bias else node.output[0]]),
        ]
        if bias:
            found.append(helper.make_node("Add", [product, *bias], list(node.output)))
        for index, made in enumerate(found):
            made.name = f"{node.name}/{index}"
        return found

    def int8_weights(self, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """s1 (q - z) as int8 [K, N] of every dual weight, computed from its 4-bit codes [N, blocks, block / 2]."""
        found: list[onnx.NodeProto] = []
        for node in nodes:
            if node.op_type != "DualLinear" or node.input[1] in self.int8:
                continue
            _, codes, scales, zeros, row, *_ = node.input
            sizes = _attributes(node)
            n, k, block = sizes["N"], sizes["K"], sizes["block_size"]
            blocks = -(-k // block)

            def inner(part: str, of: str = codes) -> str:
                return self.name(of, part)

            cast: dict[str, Any] = dict(to=TensorProto.INT8)
            last, first = self.constant(np.array([-1], np.int64)), self.constant(np.array([0], np.int64))
            one = self.constant(np.array([1], np.int64))
            found += [
                helper.make_node("Cast", [self._seen(codes, [n, blocks, block])], [inner("q")], **cast),
                helper.make_node("Cast", [self._seen(zeros, [n, blocks + blocks % 2])], [inner("padded")], **cast),
                helper.make_node(
                    "Slice", [inner("padded"), first, self.constant(np.array([blocks])), one], [inner("flat")]
                ),
                helper.make_node("Unsqueeze", [inner("flat"), last], [inner("z")]),
                helper.make_node("Unsqueeze", [row, last], [inner("row")]),
                helper.make_node("Div", [scales, inner("row")], [inner("ratio")]),
                helper.make_node("Round", [inner("ratio")], [inner("whole")]),
                helper.make_node("Cast", [inner("whole")], [inner("s1")], **cast),
                helper.make_node("Unsqueeze", [inner("s1"), last], [inner("steps")]),
                helper.make_node("Sub", [inner("q"), inner("z")], [inner("levels")]),
                helper.make_node("Mul", [inner("levels"), inner("steps")], [inner("blocks")]),
                helper.make_node(
                    "Reshape", [inner("blocks"), self.constant(np.array([n, blocks * block]))], [inner("rows")]
                ),
                helper.make_node("Transpose", [inner("rows")], [inner("columns")], perm=[1, 0]),
            ]
            weight = inner("columns")
            if blocks * block != k:
                weight = inner("int8")
                ends = [first, self.constant(np.array([k], np.int64)), first]
                found.append(helper.make_node("Slice", [inner("columns"), *ends], [weight]))
            self.int8[codes] = weight
        for made in found:
            made.name = made.output[0]
        return found

    def _seen(self, name: str, dims: list[int], kind: int = TensorProto.UINT4) -> str:
        """The bytes of a uint8 weight in another shape and type: on disk they lie there once."""
        seen = self.name(name, "x".join(map(str, dims)))
        if seen not in self.weights:
            tensor = copy.deepcopy(self.weights[name])
            tensor.name, tensor.data_type = seen, kind
            tensor.dims[:] = dims
            self.weights[seen] = tensor
            self.graph.initializer.append(tensor)
        return seen


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
