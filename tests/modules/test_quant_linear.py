"""QuantLinear: what it computes, its empty form for loading, casts; RotatedLinear."""

from __future__ import annotations

import pytest
import torch

from qcompile.modules.quant_linear import BUFFERS, QuantLinear, RotatedLinear, result_dtype
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import apply_hadamard, random_signs
from qcompile.numerics.qtensor import PARTS
from qcompile.numerics.rounding import quantize_tensor

FORMATS = [
    "int8/row", "int8/tensor", "int4/group16", "int4/group16/zero", "int4/group16/floatzero", "int4/group16/zero/dual",
    "int3/row/zero", "fp8/row", "fp4/group16/m2",
]  # fmt: skip
N, K = 12, 40


def quant_linear(text="int4/group16/zero", act=None, **more):
    form = Format.parse(text)
    q = quantize_tensor(torch.randn(N, K), form)
    tensors = {**dict(zip(PARTS, q.stored_parts, strict=True)), **more}
    return QuantLinear(K, N, form, act, tensors), q


@pytest.mark.parametrize("text", FORMATS)
def test_it_is_the_linear_of_the_dequantized_weight(text):
    bias, x = torch.randn(N), torch.randn(3, 2, K)
    module, q = quant_linear(text, bias=bias)
    assert torch.equal(module.weight, q.dequantize())
    assert torch.allclose(module(x), torch.nn.functional.linear(x, q.dequantize(), bias), rtol=1e-5, atol=1e-5)


def test_hadamard_activation_and_correction_come_in_this_order():
    """The correction sees the rotated x before it is quantized."""
    signs, act = random_signs(K, 0).float(), Format("int8")
    low_in, low_out = torch.randn(2, K), torch.randn(N, 2)
    module, q = quant_linear("int8/row", act, signs=signs, low_in=low_in, low_out=low_out)
    x = torch.randn(5, K)
    rotated = apply_hadamard(x, signs)
    want = quantize_tensor(rotated, act).dequantize() @ q.dequantize().t() + rotated @ low_in.t() @ low_out.t()
    assert torch.allclose(module(x), want, rtol=1e-5, atol=1e-4)
    assert "hadamard, low rank 2" in repr(module)


def test_int8_factors_are_dequantized():
    codes, scale = torch.randint(-9, 9, (2, K), dtype=torch.int8), torch.rand(2, 1)
    module, _ = quant_linear(low_in=codes, low_in_scale=scale, low_out=torch.randn(N, 2))
    assert (
        torch.equal(module.factors(torch.float32)[0], codes * scale) and quant_linear()[0].factors(torch.float32) == []
    )


@pytest.mark.parametrize("text", FORMATS)
def test_an_empty_one_takes_the_tensors_of_the_saved(text):
    module, _ = quant_linear(text, bias=torch.randn(N), low_in=torch.randn(2, K), low_out=torch.randn(N, 2))
    has = {name for name in BUFFERS if getattr(module, name) is not None}
    empty = QuantLinear.empty(K, N, module.format, None, has, rank=2)
    for name in has:
        mine, theirs = getattr(empty, name), getattr(module, name)
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), name
    empty.load_state_dict(module.state_dict(), strict=True, assign=True)
    x = torch.randn(2, K)
    assert torch.equal(empty(x), module(x))


def test_an_empty_one_of_k6_takes_the_tensors_of_the_saved():
    form = Format.parse("int4/group32/k6")
    q = quantize_tensor(torch.randn(N, 512), form)
    module = QuantLinear(512, N, form, None, dict(zip(PARTS, q.stored_parts, strict=True)))
    empty = QuantLinear.empty(512, N, form, None, set(PARTS))
    assert [getattr(empty, n).shape for n in PARTS] == [getattr(module, n).shape for n in PARTS]
    assert [getattr(empty, n).dtype for n in PARTS] == [getattr(module, n).dtype for n in PARTS]
    empty.load_state_dict(module.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 512, requires_grad=True)
    assert torch.equal(empty(x), module(x)) and torch.allclose(module(x), x @ q.dequantize().t(), atol=1e-4)
    assert torch.allclose(torch.autograd.grad(module(x).sum(), x)[0], q.dequantize().sum(0).expand(2, -1), atol=1e-4)


def test_a_cast_keeps_codes_and_scales():
    module, q = quant_linear("fp8/row", bias=torch.randn(N))
    module.bfloat16()
    assert module.codes.dtype == torch.float8_e4m3fn and torch.equal(module.scale, q.scale)
    assert module.bias.dtype == torch.bfloat16 and module(torch.randn(1, K).bfloat16()).dtype == torch.bfloat16


def test_a_rotated_linear_rotates_its_input():
    inner, signs, x = torch.nn.Linear(K, N), random_signs(K, 1).float(), torch.randn(3, K)
    assert torch.allclose(RotatedLinear(inner, signs)(x), inner(apply_hadamard(x, signs)), atol=1e-6)


def test_autocast_leaves_float64_and_meta_tensors_alone():
    """As nn.Linear: autocast knows no float64, and no meta device."""
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert result_dtype(x) == torch.float64 and result_dtype(x.float()) == torch.bfloat16
        assert result_dtype(x.float().to("meta")) == torch.float32
