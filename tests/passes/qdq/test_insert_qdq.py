"""Quantize/dequantize around a product: what the graph then computes, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import DequantizeCall, QuantizeCall
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.passes.qdq.insert_qdq import corrected_sites, float_input, matrix_of, put_codes
from qcompile.passes.qdq.site_plan import PlannedSite
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.report import SiteReport


class Siblings(nn.Module):
    """Two linears on one input, and one weight that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.again = nn.Linear(24, 16), nn.Linear(24, 16, bias=False), nn.Linear(16, 16)

    def forward(self, x):
        return self.again(torch.tanh(self.again(self.first(x) * self.second(x))))


def insert(program, weight, act=None, **more):
    """Quantize every site in place; returns the context."""
    context = PassContext.of(program, **more)
    for site in find_sites(program):
        q = quantize_tensor(matrix_of(program, site), weight)
        put_codes(program, PlannedSite(site, weight, act), q.stored_parts, context)
    program.cleanup()
    return context


def program_and_input():
    torch.manual_seed(0)
    model, x = Siblings().requires_grad_(False), torch.randn(5, 24)
    return model, capture(model, (x,)), x


@pytest.mark.parametrize("act", [None, "int8", "int8/row/zero", "int8/tensor", "fp8"])
@pytest.mark.parametrize(
    "weight", ["int8", "int4/group8/zero", "int3/group8/floatzero", "int4/group8/zero/dual", "fp4"]
)
def test_the_graph_rounds_weights_and_inputs(weight, act):
    model, program, x = program_and_input()
    weight, act = Format.parse(weight), act and Format.parse(act)
    insert(program, weight, act)

    def linear(x, layer):
        x = x if act is None else quantize_tensor(x, act).dequantize()
        return nn.functional.linear(x, quantize_tensor(layer.weight, weight).dequantize(), layer.bias)

    y = linear(x, model.first) * linear(x, model.second)
    expected = linear(torch.tanh(linear(y, model.again)), model.again)
    assert torch.allclose(program(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_sites_on_one_value_share_its_codes_and_sites_on_one_weight_its_parts():
    _, program, _ = program_and_input()
    insert(program, Format("int8"), Format("int8"))
    assert len(list(QuantizeCall.find(program))) == 3, "one for both siblings, one for each call of the third"
    calls = [call for _, call in DequantizeCall.find(program) if not call.of_activation]
    assert len(calls) == 4 and len({call.codes for call in calls}) == 3
    assert sorted(name for name in program.weights if "again" in name) == [
        "again.bias", "again.weight.codes", "again.weight.scale"
    ]  # fmt: skip


def test_inputs_in_two_formats_are_quantized_twice():
    _, program, _ = program_and_input()
    context = PassContext.of(program)
    for site, act in zip(find_sites(program), (Format("int8"), Format("int8", "tensor")), strict=False):
        q = quantize_tensor(program.weights[site.name], Format("int8"))
        put_codes(program, PlannedSite(site, Format("int8"), act), q.stored_parts, context)
    assert sorted(call.format for _, call in QuantizeCall.find(program)) == ["int8/row", "int8/tensor"]


def test_the_sites_report_is_filled_in():
    _, program, _ = program_and_input()
    sites = {"first.weight": SiteReport("first.weight", 16, 24, reason="the recipe does not quantize")}
    insert(program, Format.parse("int4/group8/zero"), Format("int8"), sites=sites)
    (report,) = sites.values()
    assert report.quantized and not report.reason and (report.weight, report.act) == ("int4/group8/zero", "int8/row")
    assert report.bytes_after == 16 * 12 + 16 * 3 * 4 + 16 * 3  # two codes a byte; a scale and a zero point a group


def test_the_float_weight_is_kept_for_a_correction_only():
    model, program, x = program_and_input()
    insert(program, Format("int8"), Format("int8"))
    assert not list(corrected_sites(program))
    _, program, x = program_and_input()
    insert(program, Format.parse("int4/group8"), Format("int8"), keep_float_weights=True)
    found = list(corrected_sites(program))
    weights = [model.first.weight, model.second.weight, model.again.weight, model.again.weight]
    assert len(found) == 4
    for (_, original, dequantized), weight in zip(found, weights, strict=True):
        assert torch.equal(original, weight)
        assert torch.equal(dequantized, quantize_tensor(weight, Format.parse("int4/group8")).dequantize())
    assert float_input(found[0][0]) is float_input(found[1][0]) is program.inputs[0]


def test_a_model_in_bfloat16_stays_in_bfloat16():
    model, x = Siblings().bfloat16().requires_grad_(False), torch.randn(5, 24).bfloat16()
    program = capture(model, (x,))
    insert(program, Format("int8"), Format("int8"))
    assert {call.dtype for _, call in DequantizeCall.find(program)} == {torch.bfloat16}
    assert program(x)[0].dtype == torch.bfloat16


def test_an_input_that_is_written_in_place_is_quantized_when_it_is_whole():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(24, 16)

        def forward(self, x):
            y = torch.zeros_like(x)
            y[:, :12] = x[:, 12:]
            y[:, 12:] = torch.tanh(x[:, :12])
            return self.layer(y)

    model, x = Written().requires_grad_(False), torch.randn(5, 24)
    program = capture(model, (x,))
    insert(program, Format("int8"), Format("int8"))
    y = quantize_tensor(torch.cat([x[:, 12:], torch.tanh(x[:, :12])], 1), Format("int8")).dequantize()
    weight = quantize_tensor(model.layer.weight, Format("int8")).dequantize()
    assert torch.allclose(program(x)[0], nn.functional.linear(y, weight, model.layer.bias), atol=1e-5)


@pytest.mark.parametrize("rows_first", [False, True])
def test_a_stack_of_experts_is_rounded_row_by_row(rows_first):
    class Batched(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 8, 16) if rows_first else torch.randn(3, 16, 8))

        def forward(self, x):
            return torch.bmm(x, self.stack.transpose(1, 2) if rows_first else self.stack)

    model, x = Batched().requires_grad_(False), torch.randn(3, 5, 16)
    program = capture(model, (x,))
    (site,) = find_sites(program)
    rows = model.stack if rows_first else model.stack.transpose(1, 2)  # [E, N, K]
    assert torch.equal(matrix_of(program, site), rows.flatten(0, 1))
    for form in (Format("int4"), Format("int4", "tensor")):  # of all experts
        whole = quantize_tensor(rows.flatten(0, 1), form).dequantize().unflatten(0, (3, 8))
        quantized = program.copy()
        insert(quantized, form)
        assert torch.allclose(quantized(x)[0], x @ whole.transpose(1, 2), rtol=1e-4, atol=1e-5)
        assert quantized.weights["stack.codes"].shape == (3, 8, 8), "E, N and K in bytes"
