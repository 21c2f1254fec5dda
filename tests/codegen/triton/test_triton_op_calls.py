"""The views of calls of the operators have the arguments of their schemas, in order."""

from __future__ import annotations

import dataclasses

import pytest

from qcompile.codegen.triton.triton_op_calls import LinearA8Call, LinearW4A8Call, LinearWCall, RowQuantCall


@pytest.mark.parametrize("view", [LinearWCall, LinearA8Call, LinearW4A8Call, RowQuantCall])
def test_fields_are_the_schema(view):
    assert [f.name for f in dataclasses.fields(view)] == [a.name for a in view.target._schema.arguments]
