"""Initializers of a graph: constants, each once, and other views of the bytes of a weight that is stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.codegen.onnx.lowering.op_inputs import DOMAIN


@dataclass(frozen=True)
class Constants:
    """Constants as initializers of a graph. Their names are their content: equal ones are one, in copies too."""

    graph: ir.Graph

    def tensor(self, array: np.ndarray) -> ir.Value:
        """An array."""
        content = f"{array.dtype}{array.shape}".encode() + array.tobytes()
        name = f"{DOMAIN}/{array.dtype}_{hashlib.sha256(content).hexdigest()[:16]}"
        return self.graph.initializers.get(name) or add_initializer(self.graph, ir.tensor(array, name=name))

    def int64(self, *values: int) -> ir.Value:
        """A vector."""
        return self.tensor(np.array(values, np.int64))

    def float32(self, value: float) -> ir.Value:
        """A scalar."""
        return self.tensor(np.array(value, np.float32))

    def uint8(self, value: int) -> ir.Value:
        """A scalar."""
        return self.tensor(np.array(value, np.uint8))


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A tensor as an initializer under its own name, without type and shape, which the file does not repeat."""
    value = ir.Value(name=tensor.name, const_value=tensor)
    graph.register_initializer(value)
    return value


def reinterpret(weight: ir.Value, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
    """The bytes of a uint8 initializer as a tensor of another shape and type."""
    graph, tensor = weight.graph, weight.const_value
    name = f"{weight.name}/{dtype}_{'x'.join(map(str, shape))}"
    if name in graph.initializers:
        return graph.initializers[name]
    if isinstance(tensor, ir.ExternalTensor):
        return add_initializer(graph, _external(tensor, name, shape, dtype, tensor.offset, tensor.length))
    if dtype.bitwidth < 8:
        return add_initializer(graph, ir.PackedTensor(tensor.numpy().reshape(-1), dtype, shape=shape, name=name))
    return add_initializer(graph, ir.tensor(tensor.numpy().reshape(shape), dtype, name=name))


def row_range(weight: ir.Value, first: int, count: int) -> ir.Value:
    """Rows `first` to `first + count` of an initializer [N, ..]: of external data the same bytes."""
    graph, tensor = weight.graph, weight.const_value
    name = f"{weight.name}/rows_{first}_{first + count}"
    if name in graph.initializers:
        return graph.initializers[name]
    if isinstance(tensor, ir.ExternalTensor):
        row = tensor.nbytes // tensor.shape[0]
        shape, offset = [count, *tensor.shape[1:]], (tensor.offset or 0) + first * row
        return add_initializer(graph, _external(tensor, name, shape, tensor.dtype, offset, count * row))
    return add_initializer(graph, ir.tensor(tensor.numpy()[first : first + count], name=name))


def _external(
    tensor: ir.ExternalTensor, name: str, shape: Sequence[int], dtype: ir.DataType, offset: int | None,
    length: int | None,
) -> ir.ExternalTensor:  # fmt: skip
    place = dict(offset=offset, length=length, base_dir=tensor.base_dir)
    return ir.ExternalTensor(tensor.location, dtype=dtype, shape=ir.Shape(shape), name=name, **place)
