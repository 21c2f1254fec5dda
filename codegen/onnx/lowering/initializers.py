"""What a graph holds: constants, each once, and other ways to see the bytes of a weight that lies there once."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qcompile.codegen.onnx.lowering.node_builder import DOMAIN


class Stored:
    """The initializers of one graph, by name; new ones are added to it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self._constants: dict[tuple[str, bytes], str] = {}

    def constant(self, value: np.ndarray) -> str:
        """The name of a constant; equal ones are one."""
        key = (f"{value.dtype}{value.shape}", value.tobytes())
        if key not in self._constants:
            self._constants[key] = f"{DOMAIN}/constant_{len(self._constants)}"
            self.graph.initializer.append(numpy_helper.from_array(value, self._constants[key]))
        return self._constants[key]

    def whole(self, *values: int) -> str:
        """A constant vector of integers."""
        return self.constant(np.array(values, np.int64))

    def seen(self, name: str, dims: list[int], kind: int = TensorProto.UINT4) -> str:
        """The bytes of a uint8 weight in another shape and type."""
        new = "/".join((DOMAIN, name, "x".join(map(str, dims))))
        if new not in self.weights:
            tensor = self._another(name, new, dims)
            tensor.data_type = kind
        return new

    def rows(self, name: str, first: int, count: int) -> str:
        """Some rows of a weight [N, ..]: the same bytes, from a later one on."""
        new = "/".join((DOMAIN, name, f"{count}_from_{first}"))
        if new not in self.weights:
            whole, tensor = self.weights[name], self._another(name, new, [count, *self.weights[name].dims[1:]])
            if whole.data_location == TensorProto.EXTERNAL:
                place = {entry.key: entry for entry in tensor.external_data}
                row = int(place["length"].value) // whole.dims[0]
                place["offset"].value = str(int(place["offset"].value) + first * row)
                place["length"].value = str(count * row)
            else:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(whole)[first : first + count], new))
        return new

    def _another(self, name: str, new: str, dims: list[int]) -> TensorProto:
        tensor = self.graph.initializer.add()
        tensor.CopyFrom(self.weights[name])
        tensor.name = new
        tensor.dims[:] = dims
        self.weights[new] = tensor
        return tensor
