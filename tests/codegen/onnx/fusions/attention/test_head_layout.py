"""Heads are flattened and unflattened around ONNX Runtime's attentions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.codegen.onnx.fusions.attention.head_channels import HeadChannels
from qcompile.codegen.onnx.fusions.attention.head_layout import (
    find_flattened,
    flatten_heads,
    replace_output,
    reshape_to_batch,
)
from qcompile.ir.capture import capture

aten = torch.ops.aten

FLATTENINGS = {
    "flatten": lambda out: out.transpose(1, 2).flatten(2),
    "reshape": lambda out: out.permute(0, 2, 1, 3).contiguous().reshape(2, 3, 8),
    "through four dimensions": lambda out: out.transpose(1, 2).unsqueeze(0).squeeze(0).reshape(2, 3, 8),
    "wrong order": lambda out: out.reshape(2, 3, 8),
    "scaled": lambda out: out.transpose(1, 2).flatten(2) * 2,
    "none": lambda out: out,
}


class Attention(nn.Module):
    """`out` [B, 2, S, 4] and what a model makes of it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, q, k, v):
        return FLATTENINGS[self.kind](nn.functional.scaled_dot_product_attention(q, k, v))


def program_of(kind):
    program = capture(Attention(kind), tuple(torch.randn(2, 2, 3, 4) for _ in range(3)), {})
    return program, next(n for n in program.graph.nodes if "scaled_dot" in str(n.target))


@pytest.mark.parametrize("kind", FLATTENINGS)
def test_the_flattened_output_is_found(kind):
    program, node = program_of(kind)
    found = find_flattened(program, node, 2)
    expected = {"flatten", "reshape", "through four dimensions", "scaled"}
    assert (found is not None) == (kind in expected)
    if kind in expected - {"scaled"}:
        assert found is program.outputs[0]


def test_flatten_is_recognized_as_the_operator_too():
    """aten.flatten, which torch.export decomposes and other captures keep."""
    program, node = program_of("none")
    moved = program.insert(aten.transpose.int, (node, 1, 2), after=node)
    flat = program.insert(aten.flatten.using_ints, (moved, 2), after=moved)
    program.output_node.args = ((flat,),)
    assert find_flattened(program, node, 2) is flat


@pytest.mark.parametrize("kind", FLATTENINGS)
def test_another_value_takes_the_place_of_the_output(kind):
    program, node = program_of(kind)
    inputs = [torch.randn(2, 2, 3, 4) for _ in range(3)]
    want = program(*inputs)[0]
    with program.graph.inserting_before(node):
        again = program.graph.node_copy(node)
    flat = program.insert(aten.transpose.int, (again, 1, 2), before=node)
    flat = program.insert(aten.reshape.default, (flat, (2, 3, 8)), before=node)
    replace_output(program, node, 2, flat)
    program.cleanup()
    assert node not in program.graph.nodes and torch.equal(program(*inputs)[0], want)


@pytest.mark.parametrize("rows", [list(range(8)), [4, 5, 6, 7, 0, 1, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("source", ["linear", "heads", "flat"])
def test_heads_in_any_order_are_flattened_in_order(rows, source):
    class Source(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(x)
            return {"linear": y, "heads": (y * 2).unflatten(-1, (2, 4)).transpose(1, 2), "flat": y * 2}[source]

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    program = capture(Source().eval(), (x,), {})
    node = program.outputs[0]
    value = program(x)[0]
    channels = value.transpose(1, 2).flatten(2) if source == "heads" else value
    flat = flatten_heads(program, HeadChannels(node, torch.tensor(rows), 1.0), program.output_node, "new")
    program.output_node.args = ((flat,),)
    program.cleanup()
    assert torch.allclose(program(x)[0], channels[..., rows], atol=1e-6)


def test_rows_of_a_batch_in_one_get_the_sizes_of_the_input():
    class Flat(nn.Module):
        def forward(self, ids, x):
            return x * ids.sum()

    ids, x = torch.ones(2, 3), torch.randn(6, 8)
    program = capture(Flat(), (ids, x), {})
    node = program.outputs[0]
    split = reshape_to_batch(program, node, program.output_node, 2, 4)
    assert tuple(split.meta["val"].shape) == (2, 3, 2, 4)
