from __future__ import annotations

import onnx
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from qcompile.codegen.onnx.lowering.op_inputs import CONTRIB, DOMAIN, DualLinear
from qcompile.codegen.onnx.ops.schemas import _DOMAINS, _SCHEMAS, operator

OF_ONNX_RUNTIME = [name for name in _SCHEMAS if _DOMAINS.get(name) != DOMAIN]


@pytest.mark.parametrize("name", OF_ONNX_RUNTIME)
def test_inputs_and_attributes_are_those_of_onnx_runtime(name):
    """The first inputs in their order; those that it demands are not omitted here."""
    domain = _DOMAINS.get(name, CONTRIB)
    schema = max(
        (s for s in get_all_operator_schema() if s.name == name and s.domain == domain), key=lambda s: s.since_version
    )
    inputs, outputs, attributes = _SCHEMAS[name]
    assert len(inputs) <= len(schema.inputs) and len(outputs) <= len(schema.outputs)
    for ours, theirs in zip(inputs, schema.inputs, strict=False):
        may_omit = str(theirs.option).endswith("Optional")
        assert may_omit or not ours.endswith("?"), ours
    for theirs in schema.inputs[len(inputs) :]:
        assert str(theirs.option).endswith("Optional")
    assert set(attributes) <= set(schema.attributes)
    for attribute, kind in attributes.items():
        assert str(schema.attributes[attribute].type).endswith(f".{kind}"), attribute


def test_an_operator_is_declared_once():
    assert operator("DualLinear") is operator("DualLinear")
    schema = onnx.defs.get_schema("DualLinear", 1, DOMAIN)
    assert [formal.name for formal in schema.inputs] == [name.rstrip("?") for name in DualLinear.names()]
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    assert [formal.option == optional for formal in schema.inputs] == [n.endswith("?") for n in DualLinear.names()]
