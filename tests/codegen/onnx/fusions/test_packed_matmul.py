"""Linears of one input become one; their rows can be selected, and their bias can be split off."""

from __future__ import annotations

import pytest
import torch
from onnx_models import load_graph
from quant_linears import linear
from torch import nn
from zoo import build

import qcompile
from qcompile.codegen.onnx.fusions.packed_matmul import (
    OutputChannels,
    can_pack,
    linear_call,
    pack,
    pack_matmuls,
    split_bias,
    take_bias,
)
from qcompile.codegen.onnx.tracing.onnx_linear import onnx_linears
from qcompile.ir.capture import capture

FORMATS = [("int4/group32/zero", ""), ("int8/row", "int8/row/zero"), ("int4/group32/dual", "int8/row"), None]


class Branches(nn.Module):
    """Two linears that read the input, and one that reads their sum."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.last = first, second, nn.Linear(24, 4)

    def forward(self, x):
        return self.last(self.first(x) + self.second(x))


def program_of(forms, biases=(True, True)):
    torch.manual_seed(0)
    linears = [
        nn.Linear(64, 24, bias) if form is None else linear(*form, 64, bias)
        for form, bias in zip(forms, biases, strict=True)
    ]
    model, x = Branches(*linears).eval(), torch.randn(2, 5, 64)
    with torch.no_grad(), onnx_linears(model, contrib_ops=True):
        return capture(model, (x,), {}), x


def linears_of(program):
    return [node for node in program.graph.nodes if linear_call(program, node) is not None]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, False)])
def test_two_of_one_input_become_one(form, biases):
    program, x = program_of((form, form), biases)
    want = program(x)[0]
    assert pack_matmuls(program) == 1 and len(linears_of(program)) == 2
    assert torch.allclose(program(x)[0], want, atol=1e-5)
    assert pack_matmuls(program) == 0, "there is nothing left to pack"


def test_other_formats_and_other_inputs_stay():
    program, _ = program_of((FORMATS[0], FORMATS[2]))
    first, second, last = linears_of(program)
    assert not can_pack(program, [first, second]) and not can_pack(program, [first, last])
    assert not can_pack(program, [program.inputs[0], first]) and can_pack(program, [first])
    assert pack_matmuls(program) == 0


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_selected_and_permuted(form):
    program, x = program_of((form, form))
    first, second, _ = linears_of(program)
    rows, program.output_node.args = torch.tensor([5, 2, 2, 23]), ((first, second),)
    a, b = program(x)
    parts = [OutputChannels(second, rows), OutputChannels(first, None)]
    program.output_node.args = ((pack(program, parts, program.output_node, "new"),),)
    program.cleanup()
    assert torch.allclose(program(x)[0], torch.cat([b[..., rows], a], -1), atol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_bias_is_split_off_where_the_operator_adds_none(form):
    program, x = program_of((form, form), (True, False))
    first, second, _ = linears_of(program)
    if form == FORMATS[0]:  # MatMulNBits adds it while it multiplies
        assert split_bias(program, first) is None
        return
    assert split_bias(program, second) == (second, None)
    assert take_bias(program, second, set(second.users)) is None, "it has none"
    assert take_bias(program, first, set()) is None, "something else reads the linear with its bias"
    bare, bias = take_bias(program, first, set(first.users))
    program.output_node.args = ((first, bare, bias),)
    program.cleanup()
    whole, without, bias = program(x)
    assert torch.allclose(whole, without + bias, atol=1e-5) and bool(bias.any())


def test_float_linears_are_packed_too(tmp_path):
    qcompile.export_onnx(build("qwen2"), tmp_path / "m", progress=False)  # biases on queries, keys, values
    _, counts = load_graph(tmp_path / "m")
    assert counts["MatMul"] + counts["Gemm"] == 2 * 4 + 1
