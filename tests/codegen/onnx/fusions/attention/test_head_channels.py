"""Which channels of which value are the heads of an attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.codegen.onnx.fusions.attention.head_channels import (
    before_layouts,
    channel_source,
    fill_channels,
    find_head_channels,
    fixed_sizes,
    split_batch,
)
from qcompile.codegen.onnx.fusions.partial_evaluation import token_dependent_nodes
from qcompile.ir.capture import capture


class Heads(nn.Module):
    """Two heads of 4 channels, in one of the layouts of models."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        if self.kind == "in order":
            return y.unflatten(-1, (2, 4)).transpose(1, 2)
        if self.kind == "interleaved":
            return y.unflatten(-1, (4, 2)).permute(0, 3, 1, 2)
        if self.kind == "halved":
            return (y * 0.5).view(*y.shape[:2], 2, 4).transpose(1, 2)
        if self.kind == "of another dtype":  # type_as reads a second value, and only its dtype
            return y.unflatten(-1, (2, 4)).transpose(1, 2).double().type_as(x.double())
        if self.kind == "merged":
            return y.unflatten(-1, (2, 4)).transpose(1, 2).flatten(0, 1)
        return y.unflatten(-1, (2, 4)).transpose(1, 2).softmax(-1)


def heads_of(kind, all_positions):
    program = capture(Heads(kind).eval(), (torch.randn(2, 3, 8),), {})
    (node,), (x,) = program.outputs, program.inputs
    source = channel_source(node, token_dependent_nodes(program, None))
    found = find_head_channels(program, node, source, {x: torch.zeros(2, 3, 8)}, 2, all_positions)
    return program, source, found


@pytest.mark.parametrize(
    "kind,rows,factor",
    [
        ("in order", [0, 1, 2, 3, 4, 5, 6, 7], 1),
        ("interleaved", [0, 2, 4, 6, 1, 3, 5, 7], 1),
        ("halved", [0, 1, 2, 3, 4, 5, 6, 7], 0.5),
        ("of another dtype", [0, 1, 2, 3, 4, 5, 6, 7], 1),
        ("merged", [0, 1, 2, 3, 4, 5, 6, 7], 1),
    ],
)
def test_heads_are_channels_of_the_linear(kind, rows, factor):
    _, source, found = heads_of(kind, all_positions=True)
    assert source.target is torch.ops.aten.linear.default
    assert found.rows.tolist() == rows and found.factor == factor and found.source is source


def test_what_is_not_linear_in_the_channels_is_its_own_source():
    program, source, _ = heads_of("softmax", all_positions=True)
    assert source is program.outputs[0]


def test_a_softmax_is_no_selection_of_channels():
    program = capture(Heads("softmax").eval(), (torch.randn(2, 3, 8),), {})
    (node,), (x,) = program.outputs, program.inputs
    linear = next(n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default)
    assert find_head_channels(program, node, linear, {x: torch.zeros(2, 3, 8)}, 2, True) is None


def test_layouts_are_passed_and_products_are_not():
    class Repeated(nn.Module):
        def forward(self, x):
            return (x * 2).transpose(1, 2).repeat_interleave(2, 1).squeeze().contiguous().to(torch.float64)

    program = capture(Repeated(), (torch.randn(2, 3, 4),), {})
    assert before_layouts(program.outputs[0]).target is torch.ops.aten.mul.Tensor


def test_a_value_with_dynamic_sizes_is_filled_along_them():
    class Id(nn.Module):
        def forward(self, x):
            return x + 1

    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(Id(), (torch.randn(2, 3, 4, 5),), dynamic_shapes=({0: dynamic, 2: dynamic},))
    from qcompile.ir.capture import from_exported

    node = from_exported(exported, Id()).inputs[0]
    assert fixed_sizes(node) == [3, 5]
    filled = fill_channels(node, torch.arange(15.0))
    assert filled.shape == (2, 3, 4, 5) and torch.equal(filled[1, :, 2], torch.arange(15.0).reshape(3, 5))


def test_batch_and_heads_are_split():
    x = torch.arange(24).reshape(4, 3, 2)
    assert torch.equal(split_batch(x, 2), x.reshape(2, 2, 3, 2)) and split_batch(x[None], 2) is not None
    assert split_batch(x[None], 2).shape == (1, 4, 3, 2)
