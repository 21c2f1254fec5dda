"""Products that share their input: which they are, and their weights as one."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.sibling_products import find_siblings, merged_parts, share_quantizations
from qcompile.ir.capture import capture
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import QLinearCall, QuantizeCall
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import Rule


class _Layers(torch.nn.Module):
    def __init__(self, biases):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 8 + 8 * i, bias=bias) for i, bias in enumerate(biases))
        self.last = torch.nn.Linear(8, 8)

    def forward(self, x):
        first, *rest = (layer(x) for layer in self.layers)
        return self.last(first), *rest


def quantized(weight, act, *biases, rules=()):
    form, act_form = Format.parse(weight), Format.parse(act) if act else None
    recipe = Recipe("all", (Quantize(form, act_form, lm_head=form, lm_head_act=act_form), Fuse()), rules)
    program, _ = run(capture(_Layers(biases), (torch.randn(5, 32),)), recipe, verify=False)
    return program


def groups(program):
    return sorted(len(siblings.nodes) for siblings in find_siblings(program))


def test_those_that_read_one_value_in_one_format():
    assert groups(quantized("int8/row", "int8/row", True, True, True)) == [1, 3]
    assert groups(quantized("int4/group8/zero", None, False, False)) == [1, 2]
    assert groups(quantized("int8/row", "int8/row", True, False, True)) == [1, 1, 2]  # with and without a bias
    rule = Rule("layers.1.weight", weight=Format.parse("int4/group8/dual"))
    assert groups(quantized("int8/row", "int8/row", True, True, True, rules=(rule,))) == [1, 1, 2]


def test_a_scale_of_the_whole_weight_is_no_scale_of_channels():
    assert groups(quantized("int8/tensor", "int8/row", True, True)) == [1, 1, 1]


def test_stored_weights_one_below_the_other():
    for text in ("int8/row", "int4/group8/zero", "int4/group8/zero/dual", "fp4/group8/m2", "int3/row"):
        form, parts = Format.parse(text), [torch.randn(n, 24) for n in (8, 16)]
        joined = merged_parts([quantize_tensor(part, form).stored_parts for part in parts])
        whole = quantize_tensor(torch.cat(parts), form).stored_parts
        for a, b in zip(joined, whole, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), text


@pytest.mark.parametrize("written", [False, True])
def test_an_activation_is_quantized_once(written):
    """But for one that is written in place: it may be another value where it is quantized again."""
    program = quantized("int8/row", "int8/row", True, True)
    first = next(QuantizeCall.find(program))[0]
    copy = QuantizeCall.of(first).insert(program, after=first)
    parts = program.unpack(copy, 3)
    call_node, call = [pair for pair in QLinearCall.find(program) if pair[1].x.args[0] is first][1]
    call_node.replace_input_with(call.x, parts[0])
    call_node.replace_input_with(call.x_scale, parts[1])
    assert groups(program) == [1, 1, 1]
    QuantizeCall.of(first).x.meta[WRITTEN] = written
    share_quantizations(program)
    assert groups(program) == ([1, 1, 1] if written else [1, 2])
    program.cleanup()
