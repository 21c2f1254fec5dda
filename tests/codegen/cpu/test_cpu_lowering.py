"""A quantized linear layer in terms of the CPU kernels: which one, and the same output as the dialect's."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu.cpu_lowering import lower_to_cpu
from qcompile.ir.capture import capture
from qcompile.ir.node_meta import WRITTEN
from qcompile.ir.op_calls import OUR_OPS
from qcompile.numerics.format import Format
from qcompile.passes import Fuse, Quantize
from qcompile.pipeline.run import run
from qcompile.recipe.recipe import Recipe


def lowered(weight, act, model, x, written=False):
    form, act_form = Format.parse(weight), Format.parse(act) if act else None
    recipe = Recipe("one", (Quantize(form, act_form, lm_head=form, lm_head_act=act_form), Fuse()))
    program, _ = run(capture(model, (x,)), recipe, verify=False)
    result, prepared = program.copy(), []
    if written:
        result.inputs[0].meta[WRITTEN] = True

    def remember(layout, sources, make):
        prepared.append(layout)
        return make()

    return program, result, lower_to_cpu(result, remember), prepared


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "weight,act,kernel",
    [
        ("int8/row", "int8/row", "int8_linear"),
        ("int8/row", "int8/tensor", "int8_linear"),
        ("int8/row", None, "int8_float_linear"),
        ("int4/group32/zero/dual", "int8/row", "dual_linear"),
        ("int4/group32/dual", "int8/row", "dual_linear"),
        ("int4/group256/zero/dual", "int8/row", "dual_linear"),
        ("int4/group32/zero", "int8/row", "group_linear"),
        ("int4/group24", "int8/row", "group_linear"),
        ("int4/group32/floatzero", "int8/row", "group_linear"),
        ("int3/row", "int8/row", "group_linear"),
        ("int4/group32/zero", None, "table_linear"),
        ("int4/group40/floatzero", None, "table_linear"),
        ("int4/group32/dual", None, "table_linear"),
        ("int4/group32/zero/dual", None, "table_linear"),
        ("int3/group32", None, "table_linear"),
        ("int2/row/zero", None, "table_linear"),
        ("fp4/group32", None, "table_linear"),
        ("fp4/group32/m2", None, "table_linear"),
        ("int8/row/bf16", "int8/row", "int8_linear"),
        ("int8/row/f16", None, "int8_float_linear"),
        ("int4/group32/bf16", "int8/row", "group_linear"),
        ("int4/group32/floatzero/f16", None, "table_linear"),
        ("fp4/group32", "int8/row", "dequant_mm"),
        ("int4/group20", None, "dequant_mm"),
        ("fp8/row", "fp8/row", "dequant_mm"),
    ],
)
def test_the_kernel_computes_what_the_dialect_means(weight, act, kernel, bias):
    model, x = torch.nn.Linear(300, 40, bias=bias), torch.randn(5, 300)
    program, result, chosen, prepared = lowered(weight, act, model, x)
    ((site, by_rows),) = chosen.items()
    assert site == "weight" and all(text.startswith(kernel) for text in by_rows.values())
    widened = kernel.startswith("int8") and weight != "int8/row"  # a scale of 16 bits, in float32 for the kernel
    assert len(prepared) == (kernel != "dequant_mm") + widened
    if act not in ("fp8/row", "int8/tensor"):  # whose quantize stays a call of the dialect
        assert not any(node.target in OUR_OPS for node in result.graph.nodes)
    for m in (1, 5, 40):
        x = torch.randn(m, 300)
        assert torch.allclose(result(x)[0], program(x)[0], rtol=1e-4, atol=1e-4), m


def test_a_value_that_is_written_in_place_is_quantized_where_the_model_reads_it():
    x = torch.randn(7, 64)
    for written in (False, True):
        _, result, _, _ = lowered("int8/row", "int8/row", torch.nn.Linear(64, 32), x, written)
        (call,) = [node for node in result.graph.nodes if node.target is torch.ops.qcompile_cpu.int8_linear.default]
        assert (call.args[1] is not None) == written


class _Siblings(torch.nn.Module):
    def __init__(self, *biases):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 24 + 8 * i, bias=b) for i, b in enumerate(biases))

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "weight,act",
    [
        ("int8/row", "int8/row"),
        ("int8/row", None),
        ("int8/row/bf16", "int8/row"),
        ("int4/group32/dual", "int8/row"),
        ("int4/group24/zero", "int8/row"),
        ("int4/group32/f16", None),
        ("int4/group32/zero", None),
        ("fp4/group32/m2", None),
        ("fp8/row", "fp8/row"),
    ],
)
def test_siblings_are_one_product_with_the_same_bits(weight, act, bias):
    x = torch.randn(3, 7, 64)
    model = _Siblings(bias, bias, bias)
    _, result, chosen, _ = lowered(weight, act, model, x)
    alone = [lowered(weight, act, layer, x)[1] for layer in model.layers]
    calls = [node for node in result.graph.nodes if str(node.target).startswith("qcompile_cpu")]
    assert len(calls) == (weight != "fp8/row") and len(chosen) == 3
    assert all(("3 sites in one" in text) == (act != "fp8/row") for by in chosen.values() for text in by.values())
    for got, one in zip(result(x), alone, strict=True):
        assert torch.equal(got, one(x)[0])


class _OneWeight(torch.nn.Module):
    """One weight with five biases, in two pairs of siblings and alone, as gates that begin with equal weights."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 64))
        self.biases = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(8)) for _ in range(5)])
        self.to(dtype)

    def forward(self, x):
        y = torch.tanh(x)
        places = [x, x, y, y, torch.sin(x)]
        pairs = zip(places, self.biases, strict=True)
        return [torch.nn.functional.linear(place, self.weight, bias) for place, bias in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["int8/row", None])
def test_one_weight_with_several_biases(act, dtype):
    program, result, _, _ = lowered("int8/row", act, _OneWeight(dtype), torch.randn(7, 64, dtype=dtype))
    x = torch.randn(7, 64, dtype=dtype)
    for got, want in zip(result(x), program(x), strict=True):
        assert torch.allclose(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_codes_that_two_products_read_are_made_once():
    """A product with a bias and one without stay two; the codes of one are made inside of it, and are the same."""
    x = torch.randn(7, 64)
    for model, count in ((_Siblings(True, False), 2), (_Siblings(True), 1)):
        program, result, _, _ = lowered("int8/row", "int8/row", model, x)
        target = torch.ops.qcompile_cpu.int8_linear.default
        x_scales = [node.args[1] for node in result.graph.nodes if node.target is target]
        assert len(x_scales) == count and all((scale is None) == (count == 1) for scale in x_scales)
        for got, want in zip(result(x), program(x), strict=True):
            assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_of_few_bits_is_converted_once(dtype):
    model, x = torch.nn.Linear(64, 40).to(dtype), torch.randn(3, 64, dtype=dtype)
    program, result, _, prepared = lowered("int8/row", "int8/row", model, x)
    assert prepared == ["bytes", "joined bias"] and result(x)[0].dtype == dtype
    assert torch.equal(result(x)[0], program(x)[0])


def test_float64_stays_exact():
    model, x = torch.nn.Linear(64, 40).double(), torch.randn(3, 64, dtype=torch.float64)
    program, result, _, prepared = lowered("int8/row", "int8/row", model, x)
    assert not prepared and torch.equal(result(x)[0], program(x)[0])


@pytest.mark.parametrize("act, kernel", [(None, "table_linear"), ("int8/row", "group_linear")])
def test_k6_has_the_kernels_of_float_zero_points(act, kernel):
    program, _, chosen, _ = lowered("int4/group32/k6", act, torch.nn.Linear(512, 40), torch.randn(5, 512))
    result = lowered("int4/group32/k6", act, torch.nn.Linear(512, 40), torch.randn(5, 512))
    assert all(text.startswith(kernel) for text in chosen["weight"].values())
    program, lowered_program = result[0], result[1]
    for m in (1, 5, 40):
        x = torch.randn(m, 512)
        assert torch.allclose(lowered_program(x)[0], program(x)[0], rtol=1e-4, atol=1e-4), m
