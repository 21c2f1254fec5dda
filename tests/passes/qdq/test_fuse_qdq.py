"""Fuse's law: one operator computes what quantize/dequantize around a product does."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from zoo import build, example

from qcompile.api.example_inputs import flat_inputs
from qcompile.ir.capture import capture
from qcompile.ir.node_meta import LOW_RANK, MODULE, SITE
from qcompile.ir.op_calls import DequantizeCall, QExpertsCall, QLinearCall
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, LoRC, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.certificate import relative_error
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.rule import RecipeError


def both(program, *passes):
    """The quantized program as a Q/DQ graph, and fused."""
    unfused, _ = run(program, Recipe("unfused", passes))
    fused, report = run(program, Recipe("fused", (*passes, Fuse())))
    return unfused, fused, report


@pytest.mark.parametrize("act", [None, "int8", "int8/row/zero", "fp8"])
@pytest.mark.parametrize("weight", ["int8", "int4/group16/zero", "int4/group16/zero/dual", "fp8", "fp4/group16"])
def test_linears_keep_their_value(weight, act):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False)).requires_grad_(False)
    x, form = torch.randn(7, 32), Format.parse(weight)
    program = capture(model, (x,))
    unfused, fused, report = both(program, Quantize(form, act, lm_head=None))
    assert relative_error(fused(x), unfused(x)) < 1e-5
    calls = list(QLinearCall.find(fused))
    assert report.passes[-1].done == [node.meta[SITE] for node, _ in calls] == ["0.weight", "2.weight"]
    assert not list(DequantizeCall.find(fused)), "nothing is dequantized outside of the operator"
    first, second = (call for _, call in calls)
    assert first.bias is not None and second.bias is None
    assert (first.columns, second.columns) == (32, 48) and first.weight_format == form
    assert first.act_format == (act and Format.parse(act)) and first.dtype == torch.float32
    assert (first.x_scale is None) == (act is None)
    assert (first.x_zero is None) == (act != "int8/row/zero")


def test_dtypes_and_modules_stay():
    model, x = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16)).bfloat16().requires_grad_(False), torch.randn(7, 32)
    program = capture(model, (x.bfloat16(),))
    modules = [node.meta[MODULE] for node in program.graph.nodes if MODULE in node.meta]
    unfused, fused, _ = both(program, Quantize("int8", "int8", lm_head=None))
    found = list(QLinearCall.find(fused))
    assert [call.dtype for _, call in found] == [torch.bfloat16] * 2 and fused(x.bfloat16())[0].dtype == torch.bfloat16
    assert modules and [node.meta[MODULE] for node, _ in found] == modules
    assert relative_error(fused(x.bfloat16()), unfused(x.bfloat16())) < 0.02


def test_a_correction_stays_beside_the_product():
    model, x = nn.Sequential(nn.Linear(32, 48)).requires_grad_(False), torch.randn(7, 32)
    unfused, fused, _ = both(capture(model, (x,)), Quantize("int4/group16", None, lm_head=None), LoRC(4))
    assert relative_error(fused(x), unfused(x)) < 1e-5
    ((node, _),) = QLinearCall.find(fused)
    assert node.meta[LOW_RANK] == {"low_in": "0.weight.low_in", "low_out": "0.weight.low_out"}


def test_grouped_experts_keep_their_value():
    inputs = example("mixtral")
    program = capture(build("mixtral"), (), inputs)
    flat = flat_inputs(program, inputs, inputs)
    unfused, fused, _ = both(program, Quantize("int4/group32", None, lm_head=None))
    assert relative_error(fused(*flat)[:1], unfused(*flat)[:1]) < 1e-5
    calls = [call for _, call in QExpertsCall.find(fused)]
    assert len(calls) == 4 and not list(DequantizeCall.find(fused))
    assert all(call.format == "int4/group32" for call in calls)


@pytest.mark.parametrize("act", ["int8", "int8/row/zero", "fp8"])
def test_grouped_experts_read_codes(act):
    inputs = example("mixtral")
    program = capture(build("mixtral"), (), inputs)
    flat = flat_inputs(program, inputs, inputs)
    unfused, fused, _ = both(program, Quantize("int8", None, lm_head=None, experts_act=act))
    assert relative_error(fused(*flat)[:1], unfused(*flat)[:1]) < 1e-5
    calls = [call for _, call in QExpertsCall.find(fused)]
    assert [call.act for call in calls] == [str(Format.parse(act))] * 4 and not list(DequantizeCall.find(fused))
    assert all((call.x_zero is not None) == ("zero" in act) for call in calls)


def test_batched_experts_become_grouped_rows():
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 16, 8))

        def forward(self, x):
            return torch.bmm(x, self.stack)

    torch.manual_seed(0)
    x, model = torch.randn(3, 5, 16), Batched().requires_grad_(False)
    acts = [None, "int8", "int8/tensor", "int8/row/zero", "int8/group8"]
    for form, act in itertools.product(("int8", "int4/group8/zero", "int4/group8/zero/dual"), acts):
        config = Quantize(form, None, lm_head=None, experts_act=act)
        unfused, fused, report = both(capture(model, (x,)), config)
        ((node, call),) = QExpertsCall.find(fused)
        assert call.act == ("" if act is None else str(Format.parse(act)))
        assert report.passes[-1].done == [node.meta[SITE]] == ["stack"]
        for length in (5, 2):  # rows of an expert, a free size
            rows = x[:, :length].contiguous()
            assert relative_error(fused(rows), unfused(rows)) < 1e-5
    _, fused, _ = both(capture(model.bfloat16(), (x.bfloat16(),)), Quantize("int8", None, lm_head=None))
    assert fused(x.bfloat16())[0].dtype == torch.bfloat16


def test_fuse_needs_a_quantizing_pass():
    with pytest.raises(RecipeError, match="Fuse needs Quantize before it"):
        Recipe("alone", (Fuse(),)).check()
