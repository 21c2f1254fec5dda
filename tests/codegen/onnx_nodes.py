"""Small ONNX graphs with our own operators, what the nodes of a file are, and nodes that are wrong on purpose."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.tape import Tape

from qcompile.codegen.onnx.lowering.matmul_integer import EXACT

HEADER = '<ir_version: 10, opset_import: ["" : 21, "qcompile" : 1, "com.microsoft" : 1]>'


def graph_of(text: str, **initializers: np.ndarray) -> ir.Model:
    """A model from ONNX text without its header; initializers may be listed as inputs to give their types."""
    model = onnx.parser.parse_model(HEADER + text)
    for value in [value for value in model.graph.input if value.name in initializers]:
        model.graph.input.remove(value)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in initializers.items())
    return ir.from_proto(model)


def open_session(model: ir.Model | Path, written: str | None = None) -> onnxruntime.InferenceSession:
    """A session of a model or a file, on the CPU; `written`: where ONNX Runtime writes the graph as it runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if written is not None:
        options.optimized_model_filepath = written
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    """Outputs for the input x."""
    return open_session(model).run(None, {"x": x})


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes of a file, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g.node)


def operators(nodes: Iterable[onnx.NodeProto]) -> collections.Counter[str]:
    """How many of each operator; a choice of processor counts as the int8 matmul that both its branches hold."""
    counts: collections.Counter[str] = collections.Counter()
    for node in nodes:
        if node.op_type == "If" and node.input[0].endswith(EXACT):
            products = [[n.op_type for n in branch.g.node if "MatMul" in n.op_type] for branch in node.attribute]
            assert products == [["MatMulIntegerToFloat"]] * 2
            counts["MatMulIntegerToFloat"] += 1
        else:
            counts[node.op_type] += 1
    return counts


def operators_of(model: ir.Model) -> collections.Counter[str]:
    """The same of a model in memory."""
    return operators(ir.to_proto(model).graph.node)


def without_dot_products(model: ir.Model) -> None:
    """Make the matmul that asks the processor come out wrong, as it does where sums of u8 x s8 saturate."""
    question = next(node for node in model.graph if node.op_type == "MatMulInteger")
    largest, other = question.inputs
    pair = 2 * int(largest.const_value.numpy().max()) * int(other.const_value.numpy().max())
    assert pair > np.iinfo(np.int16).max, "or no processor gets it wrong"
    largest.const_value = ir.tensor(np.full((4, 64), 254, np.uint8))


def bend(monkeypatch: pytest.MonkeyPatch, module: ModuleType, bent: str, operator: str) -> None:
    """From now on, the node that `module` names `bent` is another operator."""

    class BentTape(Tape):
        def op(self, op_type: str, *args: Any, name: str | None = None, **kwargs: Any) -> ir.Value:
            return super().op(operator if name == bent else op_type, *args, name=name, **kwargs)

    monkeypatch.setattr(module, "Tape", BentTape)
