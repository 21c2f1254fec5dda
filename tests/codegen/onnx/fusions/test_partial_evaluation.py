"""Parts of a graph are evaluated, and what a value depends on is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.codegen.onnx.fusions.partial_evaluation import (
    UnknownInputError,
    evaluate,
    inputs_behind,
    token_dependent_nodes,
)
from qcompile.ir.capture import capture


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x, mask):
        scaled = x * self.weight
        like = torch.full_like(x, 2.0) + x.new_ones(3) + torch.zeros_like(x)  # reads sizes of x only
        return scaled + mask, like * mask


@pytest.fixture
def program():
    return capture(Two(), (torch.ones(2, 3), torch.ones(2, 3)), {})


def test_a_value_is_computed_from_what_is_given(program):
    x, _ = program.inputs
    add = program.outputs[0]
    scaled = next(n for n in program.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert evaluate(program, scaled, {x: torch.full((3,), 2.0)}).tolist() == [2.0, 4.0, 6.0]
    with pytest.raises(UnknownInputError, match="mask"):
        evaluate(program, add, {x: torch.ones(3)})
    assert evaluate(program, add, {scaled: torch.zeros(3), program.inputs[1]: torch.ones(3)}).tolist() == [1.0] * 3


def test_constants_of_a_shape_do_not_depend_on_values(program):
    """full_like is one of them: a mask that is made of it is not made of tokens."""
    x, mask = program.inputs
    scaled, like = program.outputs
    dependent = token_dependent_nodes(program, mask)
    assert {x, scaled} <= dependent and like not in dependent and mask not in dependent
    assert like in token_dependent_nodes(program, None)
    assert inputs_behind(program, like, without=scaled) == {mask}
    assert inputs_behind(program, scaled, without=like) == {x, mask}


def test_a_path_through_a_node_can_be_excluded(program):
    scaled = next(n for n in program.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert inputs_behind(program, program.outputs[0], without=scaled) == {program.inputs[1]}
