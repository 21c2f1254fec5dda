"""The product of a quantized site: exact where both sides have one scale a row, else that of the dequantized values."""

from __future__ import annotations

import pytest
import torch

from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import dequantize_to_int8
from qcompile.numerics.quantized_product import quantized_product
from qcompile.numerics.rounding import quantize_tensor

K = 4096


@pytest.mark.parametrize("form", ["int8", "int4/row", "int4/group32/zero/dual"])
@pytest.mark.parametrize("act", ["int8", "int8/tensor"])
def test_the_bits_of_exact_sums(form, act):
    w = quantize_tensor(torch.randn(3, K), Format.parse(form))
    x = quantize_tensor(torch.randn(2, 5, K), Format.parse(act))
    integers = dequantize_to_int8(w.codes, w.zero, w.group_scale, w.format) if w.format.dual else w.codes
    sums = x.codes.long() @ integers.long().t()
    got = quantized_product(x.codes, x.scale, None, w.stored_parts, w.format, act, K, torch.float32)
    assert torch.equal(got, sums.float() * x.scale * w.scale.squeeze(-1))
    wide = quantized_product(x.codes, x.scale, None, w.stored_parts, w.format, act, K, torch.float64)
    assert torch.equal(wide, sums.double() * x.scale.double() * w.scale.squeeze(-1).double())


@pytest.mark.parametrize("form", ["int8", "int8/row/zero", "int4/group32/zero", "fp8", "int8/tensor"])
@pytest.mark.parametrize("act", ["", "int8/row/zero", "int8/group32", "fp8"])
def test_the_product_of_dequantized_values(form, act):
    w, x = quantize_tensor(torch.randn(3, K), Format.parse(form)), torch.randn(2, 5, K)
    given, values = (x, None, None), x.double()
    if act:
        q = quantize_tensor(x, Format.parse(act))
        given, values = (q.codes, q.scale, q.zero), q.dequantize(torch.float64)
    weight = w.dequantize(torch.float64)
    for dtype, unit in ((torch.bfloat16, 2.0**-16), (torch.float64, 2.0**-22)):
        got = quantized_product(*given, w.stored_parts, w.format, act, K, dtype)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        error = (got.double() - values @ weight.t()).abs()
        assert bool((error <= unit * (values.abs() @ weight.abs().t())).all())
