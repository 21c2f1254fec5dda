"""The dialect in plain ATen: the same values as its operators."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen import aten_fallback
from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import random_signs
from qcompile.numerics.rounding import quantize_tensor

ops = torch.ops.qcompile


def test_activation_codes_are_the_reference():
    x = torch.randn(7, 33)
    codes, scale = aten_fallback.quantize_int8_rows(x)
    want = ops.quantize(x, "int8/row")
    assert torch.equal(codes, want[0]) and torch.equal(scale, want[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 0.3, 5.0])
def test_codes_with_a_zero_point_are_the_reference(bits, shift):
    x = torch.cat([torch.randn(5, 24) + shift, torch.zeros(1, 24)])
    want = torch.ops.qcompile.quantize(x, f"int{bits}/row/zero")
    found = aten_fallback.quantize_rows_with_zero(x, largest=2**bits - 1)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_row_of_zeros_has_a_scale_of_one():
    codes, scale = aten_fallback.quantize_int8_rows(torch.zeros(2, 8))
    assert not codes.any() and scale.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("text", ["int4/group32/zero", "int3/row", "int4/group32/zero/dual", "fp4/group32", "fp8/row"])
@pytest.mark.parametrize("act", ["", "int8/row"])
def test_any_format_is_the_reference(text, act):
    form, x, bias = Format.parse(text), torch.randn(2, 3, 64), torch.randn(24)
    q = quantize_tensor(torch.randn(24, 64), form)
    x_scale = None
    if act:
        x, x_scale, _ = ops.quantize(x, act)
    want = ops.qlinear(x, x_scale, None, *q.stored_parts, bias, text, act, 64, torch.float32)
    got = aten_fallback.dequantized_linear(
        x, x_scale, None, *q.stored_parts, bias, form=form, act=act, columns=64, dtype=torch.float32
    )
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    values = ops.dequantize(*q.stored_parts, text, 64, torch.float32)
    assert torch.equal(aten_fallback.dequantize(*q.stored_parts, form=form, columns=64, dtype=torch.float32), values)


def test_a_transform_is_the_reference():
    x, signs = torch.randn(3, 48), random_signs(48, 0).float()
    assert torch.equal(aten_fallback.hadamard(x, signs), ops.hadamard(x, signs))
