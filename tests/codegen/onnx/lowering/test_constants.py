from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.codegen.onnx.lowering.constants import Constants, reinterpret, row_range


def graph_with(array: np.ndarray, external: bool, folder) -> ir.Graph:
    """A graph that holds `w`, as a file has it: in the graph or in a file of external data, behind another tensor."""
    tensors = [ir.tensor(np.arange(7, dtype=np.uint8), name="first"), ir.tensor(array, name="w")]
    values = [ir.val(tensor.name, const_value=tensor) for tensor in tensors]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 21}, name="g")
    data = dict(external_data="data", size_threshold_bytes=0) if external else {}
    ir.save(ir.Model(graph, ir_version=10), folder / "m.onnx", **data)
    return ir.load(folder / "m.onnx").graph


def test_equal_constants_are_one_and_their_names_are_their_content():
    graphs = [ir.Graph([], [], nodes=[], name="g") for _ in range(2)]
    one, other = Constants(graphs[0]), Constants(graphs[1])
    assert one.int64(1, 2) is one.int64(1, 2) is not one.int64(2, 1)
    other.float32(0.5)  # the order of constants does not matter
    assert other.int64(1, 2).name == one.int64(1, 2).name
    values = [one.int64(1), one.float32(1), one.uint8(1), one.tensor(np.array([[1]])), one.tensor(np.float32([1]))]
    assert len({value.name for value in values}) == len(values), "a constant is its type and shape too"
    assert len(graphs[0].initializers) == len(values) + 2


@pytest.mark.parametrize("external", [True, False])
def test_views_of_a_weight_are_its_bytes(external, tmp_path):
    packed = np.random.default_rng(0).integers(0, 256, (6, 2, 4), np.uint8)
    graph = graph_with(packed, external, tmp_path)
    weight = graph.initializers["w"]
    nibbles = reinterpret(weight, [6, 16], ir.DataType.UINT4)
    assert np.array_equal(nibbles.const_value.numpy().astype(np.uint8)[:, ::2], packed.reshape(6, 8) & 15)
    assert np.array_equal(reinterpret(weight, [12, 4], ir.DataType.UINT8).const_value.numpy(), packed.reshape(12, 4))
    rows = row_range(weight, 2, 3)
    assert np.array_equal(rows.const_value.numpy(), packed[2:5])
    assert rows is row_range(weight, 2, 3) and nibbles is reinterpret(weight, [6, 16], ir.DataType.UINT4)
    if external:
        assert rows.const_value.offset == weight.const_value.offset + 2 * 8 and rows.const_value.length == 3 * 8
        nested = reinterpret(rows, [3, 16], ir.DataType.UINT4).const_value
        assert (nested.offset, nested.length) == (rows.const_value.offset, 24)
