"""Weights in the layouts of MatMulNBits and DequantizeLinear are the same weights."""

from __future__ import annotations

import pytest
import torch
from quant_linears import linear

from qcompile.codegen.onnx.ops.matmul_ops import blocked_linear, dequantize_blocks
from qcompile.codegen.onnx.tracing.weight_layouts import (
    block_size_of,
    to_dequantize_linear,
    to_matmul_nbits,
    weight_of,
)
from qcompile.numerics.format import Format

FORMATS = ["int8/row", "int4/row", "int4/group32", "int4/group32/zero", "int4/group32/dual", "int2/group16/zero"]


@pytest.mark.parametrize("form", [*FORMATS, "int4/group32/floatzero", "int8/group64"])
@pytest.mark.parametrize("columns", [96, 80])
def test_blocks_dequantize_to_the_weight(form, columns):
    module = linear(form, "", columns)
    weight = weight_of(module)
    assert torch.equal(weight.dequantize(), module.weight)
    codes, scales, zeros = to_matmul_nbits(weight)
    block = block_size_of(weight.format, columns)
    assert codes.shape == (24, -(-columns // block), block * weight.format.bits // 8) and codes.dtype is torch.uint8
    values = dequantize_blocks(codes, scales, zeros, weight.format.bits, block)
    assert torch.allclose(values[:, :columns], module.weight, atol=1e-6)
    if "floatzero" not in form:
        assert not values[:, columns:].any(), "padding must add nothing to a sum"


def test_six_bit_scales_become_float_scales_and_zero_points():
    module = linear("int4/group32/k6", "", 512)
    codes, scales, zeros = to_matmul_nbits(weight_of(module))
    assert scales.dtype == zeros.dtype == torch.float32 and scales.shape == zeros.shape == (24, 16)
    values = dequantize_blocks(codes, scales, zeros, 4, 32)
    assert torch.allclose(values, module.weight, rtol=0, atol=2e-6 * float(module.weight.abs().max()))


@pytest.mark.parametrize("form", FORMATS)
def test_the_transposed_stream_multiplies_alike(form):
    module, x = linear(form, "", 80), torch.randn(3, 80)
    weight = weight_of(module)
    codes, scales, zeros = to_dequantize_linear(weight)
    got = blocked_linear(x, codes, scales, zeros, None, weight.format.bits, block_size_of(weight.format, 80))
    assert torch.allclose(got, x @ module.weight.t(), atol=1e-4)


@pytest.mark.parametrize("columns,block", [(256, 128), (192, 64), (96, 32), (80, 16), (40, 128)])
def test_a_row_is_cut_into_the_largest_blocks_that_fit(columns, block):
    assert block_size_of(Format("int8"), columns) == block
    assert block_size_of(Format.parse("int4/group32"), columns) == 32
