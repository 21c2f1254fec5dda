from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest

from qcompile.codegen.onnx.lowering.op_inputs import DualLinear, Int8Linear, MatMulNBits


def node(op_type: str, *names: str) -> ir.Node:
    return ir.node(op_type, [ir.val(name) if name else None for name in names])


def test_inputs_have_names_and_omitted_ones_are_none():
    dual = DualLinear.of(node("DualLinear", "x", "codes", "scales", "", "row_scale"))
    assert dual.zero_points is None and dual.bias is None
    assert [dual.x.name, dual.codes.name, dual.scales.name, dual.row_scale.name] == [
        "x",
        "codes",
        "scales",
        "row_scale",
    ]
    with pytest.raises(TypeError, match="is DualLinear, not Int8Linear"):
        Int8Linear.of(node("DualLinear", "x", "codes", "scales", "", "row_scale"))


def test_written_inputs_end_with_the_last_that_is_given():
    inputs = MatMulNBits.of(node("MatMulNBits", "A", "B", "scales"))
    assert [value.name for value in inputs.as_list()] == ["A", "B", "scales"]
    written = replace(inputs, bias=ir.val("bias")).as_list()
    assert written[3:5] == [None, None] and written[5].name == "bias" and len(written) == 6


def test_names_tell_what_may_be_omitted():
    assert MatMulNBits.names() == ["A", "B", "scales", "zero_points?", "g_idx?", "bias?"]
    assert DualLinear.names()[3:] == ["zero_points?", "row_scale", "bias?"]
