"""Fake quantization: the values of quantize and dequantize, the gradient of the identity."""

from __future__ import annotations

import pytest
import torch

from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor
from qcompile.numerics.straight_through import fake_quantize_ste


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["int8/row", "int4/group16/zero"])
def test_values_are_rounded_and_gradients_pass(text, dtype):
    x = torch.randn(5, 48, dtype=dtype, requires_grad=True)
    out = fake_quantize_ste(x, Format.parse(text))
    assert out.dtype == dtype and torch.equal(out, quantize_tensor(x, Format.parse(text)).dequantize(dtype))
    upstream = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(gradient, upstream)
