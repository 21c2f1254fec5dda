"""Gradients of our operators: those of the dequantized product, eager, compiled and by opcheck."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qcompile.ir.ops  # noqa: F401
from qcompile import QuantLinear
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

ops = torch.ops.qcompile
WEIGHTS = ["int8/row", "int4/group32/zero", "int4/group32", "int4/group16/floatzero", "int4/group32/zero/dual",
           "int3/group32/zero", "fp8/row", "fp4/group32/m1"]  # fmt: skip


def linear(weight, act=None, k=80, n=10, signs=False):
    form = Format.parse(weight)
    q = quantize_tensor(torch.randn(n, k), form)
    tensors = dict(zip(("codes", "scale", "zero", "group_scale"), q.stored_parts, strict=True), bias=torch.randn(n))
    tensors["signs"] = torch.randn(k).sign() if signs else None
    return QuantLinear(k, n, form, Format.parse(act) if act else None, tensors)


@pytest.mark.parametrize("act", [None, "int8/row", "int8/group32", "fp8/row"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_gradient_of_a_quantized_linear_is_that_of_its_dequantized_weight(weight, act):
    module = linear(weight, act)
    x, g = torch.randn(2, 3, 80, requires_grad=True), torch.randn(2, 3, 10)
    (dx,) = torch.autograd.grad(module(x), x, g)
    assert torch.allclose(dx, g @ torch.Tensor(module.weight), rtol=1e-5, atol=1e-5)


def test_training_and_inference_compute_the_same():
    for act in ("int8/row", "int8/row/zero", "int4/group32"):
        module = linear("int4/group32/zero", act)
        x = torch.randn(5, 80)
        trained = module(x.requires_grad_())
        with torch.no_grad():
            assert torch.allclose(trained, module(x), rtol=1e-5, atol=1e-4)


def test_the_bias_has_the_sum_over_all_rows():
    weight = quantize_tensor(torch.randn(10, 64), Format.parse("int8/row"))
    bias = torch.randn(10, requires_grad=True)
    for lead in ((3,), (2, 3), ()):
        x, g = torch.randn(*lead, 64), torch.randn(*lead, 10)
        y = ops.qlinear(x, None, None, *weight.stored_parts, bias, "int8/row", "", 64, torch.float32)
        (db,) = torch.autograd.grad(y, bias, g)
        assert torch.allclose(db, g.reshape(-1, 10).sum(0), atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "weight,act", [("int4/group32/zero", None), ("int4/group32/zero", "int8/row"), ("int8/row", None)]
)
def test_compiled_gradients_are_those_of_eager(weight, act, dynamic):
    """K = 80 ends in a ragged group, where Inductor misread expanded scales."""
    module = linear(weight, act, signs=True)
    run = torch.compile(module, fullgraph=True, dynamic=dynamic)
    x = torch.randn(2, 3, 80, requires_grad=True)
    g = torch.randn(2, 3, 10)
    (want,), (got,) = torch.autograd.grad(module(x), x, g), torch.autograd.grad(run(x), x, g)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_checkpointing_recomputes_the_same_gradient():
    module = nn.Sequential(linear("int4/group32/zero", "int8/row", n=80), nn.ReLU(), linear("int4/group32", n=80))
    x = torch.randn(4, 80, requires_grad=True)
    (want,) = torch.autograd.grad(module(x).square().sum(), x)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize("act", [None, "int8/row"])
def test_autocast_gives_its_dtype_and_gradients_of_the_input(act):
    module = nn.Sequential(linear("int4/group32/zero", act, n=64), nn.Linear(64, 64, bias=False))
    x = torch.randn(4, 80, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module[0](x)
        assert y.dtype == torch.bfloat16
        (dx,) = torch.autograd.grad(module(x).float().sum(), x)
    assert dx.dtype == torch.float32
    (want,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(dx, want, rtol=0.05, atol=0.05 * float(want.abs().max()))


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.integers(0, 3))
def test_each_expert_gives_its_rows_their_gradient(counts, beyond):
    form = Format.parse("int4/group32/zero")
    stack = [quantize_tensor(torch.randn(10, 80), form) for _ in counts]
    parts = [torch.stack([q.stored_parts[i] for q in stack]) for i in range(3)]
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts) + beyond, 80, requires_grad=True)
    g = torch.randn(len(x), 10)
    (dx,) = torch.autograd.grad(ops.qexperts(x, None, None, ends, *parts, None, str(form), "", 80, torch.float32), x, g)
    want = torch.zeros_like(x)
    for q, end, count in zip(stack, ends.tolist(), counts, strict=True):
        want[end - count : end] = g[end - count : end] @ q.dequantize()
    assert torch.allclose(dx, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [8, 12, 20])
def test_the_gradient_of_a_hadamard_transform(n):
    signs = torch.randn(n).sign()
    x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: ops.hadamard(t, signs), (x,))


def test_opcheck():
    weight = quantize_tensor(torch.randn(10, 80), Format.parse("int4/group32/zero"))
    rest = (*weight.stored_parts, torch.randn(10, requires_grad=True), "int4/group32/zero", "", 80, torch.float32)
    torch.library.opcheck(ops.qlinear.default, (torch.randn(2, 3, 80, requires_grad=True), None, None, *rest))
    torch.library.opcheck(ops.hadamard.default, (torch.randn(2, 12, requires_grad=True), torch.ones(12)))
    torch.library.opcheck(ops.fake_quantize.default, (torch.randn(2, 12, requires_grad=True), "int8/row"))
    parts = [part[None] for part in weight.stored_parts[:3]]
    x = torch.randn(4, 80, requires_grad=True)
    stack = (x, None, None, torch.tensor([3]), *parts, None, "int4/group32/zero", "", 80)
    torch.library.opcheck(ops.qexperts.default, (*stack, torch.float32))


def test_codes_of_experts_pass_no_gradient_and_say_so():
    q = quantize_tensor(torch.randn(10, 80), Format.parse("int8"))
    x, scale, _ = ops.quantize(torch.randn(4, 80), "int8")
    rest = torch.tensor([4]), q.codes[None], q.scale[None], None, None, "int8", "int8", 80, torch.float32
    with pytest.raises(ValueError, match="a gradient reached qcompile::quantize"):
        ops.qexperts(x, scale.requires_grad_(), None, *rest).sum().backward()


def test_integers_pass_no_gradient_and_say_so():
    x = torch.randn(3, 80, requires_grad=True)
    codes, scale, _ = ops.quantize(x, "int8/row")
    with pytest.raises(ValueError, match="a gradient reached qcompile::quantize.*fake_quantize"):
        scale.sum().backward()
    weight = quantize_tensor(torch.randn(10, 80), Format.parse("int8/row"))
    y = ops.qlinear(codes, scale, None, *weight.stored_parts, None, "int8/row", "int8/row", 80, torch.float32)
    with pytest.raises(ValueError, match="integers, which pass none"):
        y.sum().backward()


def test_a_scale_of_codes_is_no_parameter():
    weight = quantize_tensor(torch.randn(10, 80), Format.parse("int8/row"))
    codes, scale, _ = ops.quantize(torch.randn(3, 80), "int8/row")
    scale.requires_grad_()
    y = ops.qlinear(codes, scale, None, *weight.stored_parts, None, "int8/row", "int8/row", 80, torch.float32)
    with pytest.raises(ValueError, match="integers, which pass none"):
        y.sum().backward()
