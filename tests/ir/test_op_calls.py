"""Typed views of our operators: their fields are the schema's arguments, and they survive a round trip."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from qcompile.ir.capture import capture
from qcompile.ir.op_calls import (
    DequantizeCall,
    FixedPointConvCall,
    FixedPointLinearCall,
    GroupAdapterCall,
    HadamardCall,
    LowRankLinearCall,
    OpCall,
    QExpertsCall,
    QLinearCall,
    QuantizeCall,
    StackAdapterCall,
)
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

VIEWS = [
    QuantizeCall, DequantizeCall, HadamardCall, QLinearCall, QExpertsCall, GroupAdapterCall, StackAdapterCall,
    LowRankLinearCall, FixedPointLinearCall, FixedPointConvCall,
]  # fmt: skip
ops = torch.ops.qcompile
WEIGHT, ACT = "int4/group16/zero", "int8/row"


class EveryOperator(torch.nn.Module):
    """Calls each operator once."""

    def __init__(self):
        super().__init__()
        q = quantize_tensor(torch.randn(12, 32), Format.parse(WEIGHT))
        for name, part in zip(("codes", "scale", "zero"), q.stored_parts[:3], strict=True):
            self.register_buffer(name, part)
        self.register_buffer("signs", torch.ones(32))
        self.register_buffer("ends", torch.tensor([2, 5], dtype=torch.int32))
        shapes = {"matrix": (12, 32), "kernel": (6, 4, 3), "a": (3, 2), "b": (12, 3), "low": (3, 32), "basis": (3, 12)}
        for name, shape in {**shapes, "first": (12,), "similarities": (2,), "act_range": (), "gamma": ()}.items():
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("schedule", torch.tensor([0, 4, 0, 1]))
        self.register_buffer("counter", torch.tensor(0))

    def forward(self, x):
        x = ops.hadamard(x, self.signs)
        codes, scale, _ = ops.quantize(x, ACT)
        weight = self.codes, self.scale, self.zero
        y = ops.qlinear(codes, scale, None, *weight, None, None, WEIGHT, ACT, 32, torch.float32)
        stack = (part.unflatten(0, (2, 6)) for part in weight)
        z = ops.qexperts(codes, scale, None, self.ends, *stack, None, WEIGHT, ACT, 32, torch.float32)
        state = self.act_range, self.gamma, self.counter, None, None, str(FixedPointFormat()), False, torch.float32
        trained = [
            ops.group_adapter(x, self.a, self.b, 16, 2.0),
            ops.stack_adapter(self.a[None], self.b[None], 32, 16, 2.0, torch.float32),
            ops.low_rank_linear(
                x, self.matrix, None, None, self.low, None, self.basis, None, None, self.first, self.similarities,
                self.schedule, "", "", 0.4, 2, torch.float32,
            ),
            ops.fixed_point_linear(x, self.matrix, None, *state)[0],
            ops.fixed_point_conv(x.view(-1, 4, 8), self.kernel, None, *state, [1], [0], [1], 1)[0],
        ]  # fmt: skip
        return y, z, ops.dequantize(*weight, None, WEIGHT, 32, torch.float32), *trained


@pytest.fixture
def program():
    return capture(EveryOperator(), (torch.randn(5, 32),))


def test_every_view_is_tested():
    known, work = set(), [OpCall]
    while work:
        below = [view for view in work.pop().__subclasses__() if view.__module__ == OpCall.__module__]
        known, work = known.union(below), work + below
    assert set(VIEWS) == known


@pytest.mark.parametrize("view", VIEWS)
def test_fields_are_the_arguments_of_the_schema(view):
    assert [field.name for field in fields(view)] == [argument.name for argument in view.target._schema.arguments]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_that_is_inserted_is_read_back(view, program):
    ((node, call),) = view.find(program)
    assert view.matches(node) and call.arguments == node.args
    copy = call.insert(program, before=node)
    assert copy is not node and view.of(copy) == call
    behind = call.insert(program, after=node)
    order = list(program.graph.nodes)
    assert order.index(copy) < order.index(node) < order.index(behind) and len(list(view.find(program))) == 3


@pytest.mark.parametrize("view", VIEWS)
def test_other_nodes_are_refused(view, program):
    others = [node for node in program.graph.nodes if node.target is not view.target]
    assert len(others) > len(VIEWS)
    for node in others:
        assert not view.matches(node)
        with pytest.raises(TypeError, match=node.name):
            view.of(node)
    assert not view.matches(None)


def test_formats_and_operands(program):
    ((_, linear),) = QLinearCall.find(program)
    ((_, experts),) = QExpertsCall.find(program)
    assert (linear.weight_format, linear.act_format) == (Format.parse(WEIGHT), Format.parse(ACT))
    assert replace(linear, act="").act_format is None
    assert [program.weight_name(part) for part in linear.stored] == ["codes", "scale", "zero", None]
    assert experts.stored == (experts.weight, experts.scale, experts.zero, None)
    ((_, dequantize),) = DequantizeCall.find(program)
    assert not dequantize.of_activation and replace(dequantize, columns=0).of_activation
