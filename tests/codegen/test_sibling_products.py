"""Products that share their input: which they are, and their weights as one."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu.cpu_lowering import lower_to_cpu
from qcompile.codegen.sibling_products import find_siblings, merged_parts, share_quantizations
from qcompile.codegen.triton.gpu_lowering import lower_to_gpu
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


class _Reused(torch.nn.Module):
    """One weight merged with another in one place, and with a third, or alone, in another."""

    def __init__(self, bias, alone=False):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(64, 64, bias=bias) for _ in range(3))
        self.alone = alone

    def forward(self, x):
        y = torch.tanh(x)
        return self.a(x) * self.b(x), self.a(y).relu() if self.alone else self.a(y) * self.c(y)


class _Viewed(torch.nn.Module):
    """Views that only dense rows allow, and results that are handed out."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(64, n) for n in (64, 32, 16))

    def forward(self, x):
        b = self.b(x).transpose(0, 1).transpose(0, 1)
        return self.a(x).view(x.shape[0], -1).sin(), b.view(-1).cos(), self.c(x)


def of_every_target(module, x, recipe):
    """The module's own graph lowered for a CPU and for a GPU, and the graph."""
    program, _ = run(capture(module, (x,)), recipe, verify=False)
    for lower in (lower_to_cpu, lower_to_gpu):
        found = program.copy()
        lower(found, lambda kernel, tensors, make: make())
        found.graph_module.recompile()
        yield program(x), found(x)


def recipe_of(weight, act):
    form, act_form = Format.parse(weight), Format.parse(act) if act else None
    return Recipe("all", (Quantize(form, act_form, lm_head=form, lm_head_act=act_form), Fuse()))


@pytest.mark.parametrize("weight,act", [("int8/row", None), ("int8/row", "int8/row"), ("int4/group32/zero", None)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alone", [True, False])
def test_a_weight_that_is_merged_in_two_places_is_not_taken_for_the_other(weight, act, bias, alone):
    module, x = _Reused(bias, alone).half().eval(), torch.randn(5, 64).half()
    for want, got in of_every_target(module, x, recipe_of(weight, act)):
        for a, b in zip(want, got, strict=True):
            assert float((a.float() - b.float()).norm()) < 2e-2 * float(a.float().norm())


def test_views_of_a_part_and_parts_that_are_handed_out():
    module, x = _Viewed().half().eval(), torch.randn(4, 8, 64).half()
    for want, got in of_every_target(module, x, recipe_of("int8/row", None)):
        for a, b in zip(want, got, strict=True):
            assert a.shape == b.shape and b.is_contiguous()
            assert float((a.float() - b.float()).norm()) < 2e-2 * float(a.float().norm())


@pytest.mark.slow
def test_a_compiled_model_views_its_parts():
    import qcompile

    for module, x in ((_Viewed(), torch.randn(4, 8, 64)), (_Reused(True), torch.randn(5, 64))):
        want = [out.detach() for out in module(x)]
        got = torch.compile(module, backend=qcompile.backend.qcompile, options={"recipe": "w8a16"})
        with torch.no_grad():
            found = got(x)
        for a, b in zip(want, found, strict=True):
            assert a.shape == b.shape and float((a - b).norm()) < 5e-2 * float(a.norm())
            b.view(-1)
