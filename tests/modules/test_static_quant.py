"""Modules with static activations: the formula, gradients through nothing, dtypes, autocast, compile and ONNX."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompile.modules.static_quant import StaticQuantConv, StaticQuantLinear, code_type
from qcompile.numerics.code_convolution import ConvolutionShape

SHAPE = ConvolutionShape((1, 2), (1, 0), (1, 1), 2)


def codes(bits, *shape):
    levels = 2 ** (bits - 1) - 1
    return torch.randint(-levels, levels + 1, shape, dtype=torch.int8)


def linear(bits=4, low=-7, high=7):
    return StaticQuantLinear.of(
        codes(bits, 6, 10), bits, torch.tensor(0.1), torch.randn(6), (torch.tensor(0.3), low, high)
    )


def conv(bits=4, low=-7, high=7):
    act = torch.tensor(0.3), low, high
    return StaticQuantConv.of(codes(bits, 6, 2, 3, 3), bits, torch.tensor(0.1), torch.randn(6), act, SHAPE)


def inputs(module, dtype=torch.float32):
    return torch.randn(*((5, 10) if isinstance(module, StaticQuantLinear) else (5, 4, 7, 7)), dtype=dtype)


def expected(module, x):
    """The formula, in float64."""
    values = (x.double() / module.act_scale.double()).round().clamp(module.low, module.high) * module.act_scale.double()
    weight, bias = module.weight.double(), module.bias.double()
    if isinstance(module, StaticQuantLinear):
        return F.linear(values, weight, bias)
    return F.conv2d(values, weight, bias, SHAPE.stride, SHAPE.padding, SHAPE.dilation, SHAPE.groups)


@given(st.sampled_from([linear, conv]), st.integers(2, 8), st.sampled_from([(-7, 7), (0, 15), (0, 127)]))
def test_formula(make, bits, reach):
    module = make(bits, *reach)
    x = inputs(module) * 3
    assert torch.allclose(module(x).double(), expected(module, x), rtol=1e-5, atol=1e-5)
    assert module.codes.nbytes <= math.ceil(module.weight.numel() * (bits if bits < 5 else 8) / 8) + 6


@pytest.mark.parametrize("make", [linear, conv])
def test_nan_and_dtypes(make):
    module = make()
    x = inputs(module)
    x.view(-1)[3] = math.nan
    assert bool(module(x).isnan().any())
    for dtype in (torch.bfloat16, torch.float64):
        assert module(inputs(module, dtype)).dtype == dtype
    half = make().half()
    assert half.act_scale.dtype == torch.float32 and half(inputs(module, torch.float16)).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert module(inputs(module)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [linear, conv])
def test_what_rounding_changes_can_be_measured(make):
    module = make()
    x = inputs(module).clamp(-2, 2)
    module.rounds = False
    smooth = module(x)
    module.rounds = True
    assert not torch.equal(smooth, module(x))
    steps = (x / module.act_scale).round() * module.act_scale
    module.rounds = False
    assert torch.allclose(module(steps), expected(module, steps).float(), atol=1e-4)


@pytest.mark.parametrize("make", [linear, conv])
def test_inductor_gives_the_same(make):
    model = nn.Sequential(make()).eval()
    x = inputs(model[0])
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, backend="aot_eager")(x), model(x), rtol=1e-6, atol=1e-6)


def test_the_linear_is_quantized_in_its_operand_and_text():
    module = linear(low=0, high=15)
    x = inputs(module)
    assert torch.equal(module.operand(x), (x / 0.3).round().clamp(0, 15) * module.act_scale)
    assert "act=0..15 static" in repr(module) and "weight=int4/tensor" in repr(conv())
    assert [code_type(bits) for bits in range(2, 9)] == ["int2", "int3", "int4", *["int8"] * 4]


@pytest.mark.parametrize("make", [linear, conv])
def test_a_gradient_passes_inside_the_clip(make):
    module = make()
    x = inputs(module) * 3
    with torch.no_grad():
        want = module(x)
    x.requires_grad_()
    out = module(x)
    assert torch.allclose(out, want, rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    inside = (x.abs() / 0.3 <= 7).detach()
    assert (dx[inside] != 0).any() and not dx[~inside & (x.abs() / 0.3 > 7.5)].any()


def test_the_gradient_of_a_linear_is_that_of_its_dequantized_weight():
    module = linear()
    x, g = torch.randn(5, 10).clamp(-2, 2).requires_grad_(), torch.randn(5, 6)
    (dx,) = torch.autograd.grad(module(x), x, g)
    assert torch.allclose(dx, g @ torch.Tensor(module.weight), atol=1e-5)


def test_the_gradient_of_a_convolution_is_that_of_its_dequantized_weight():
    module = conv()
    x = inputs(module).clamp(-2, 2).requires_grad_()
    out = module(x)
    g, moves = torch.randn_like(out), (SHAPE.stride, SHAPE.padding, SHAPE.dilation, SHAPE.groups)
    (dx,) = torch.autograd.grad(out, x, g)
    (want,) = torch.autograd.grad(F.conv2d(x, module.weight, None, *moves), x, g)
    assert torch.allclose(dx, want, atol=1e-5)
