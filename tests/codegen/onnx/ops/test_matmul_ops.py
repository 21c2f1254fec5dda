"""The meaning of ONNX Runtime's quantized linears, and typed views of their calls."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import qcompile.codegen.onnx.ops  # noqa: F401  registers torch.ops.qcompile_onnx
from qcompile.codegen.onnx.ops import activation_ops, attention_ops, embedding_ops, expert_ops, matmul_ops, norm_ops
from qcompile.codegen.onnx.ops.matmul_ops import (
    DualLinearCall,
    dequantize_blocks,
    dual_linear,
    int8_linear,
    nbits_linear,
)
from qcompile.ir.op_calls import OpCall
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

CALLS = [
    call
    for module in (activation_ops, attention_ops, embedding_ops, expert_ops, matmul_ops, norm_ops)
    for call in vars(module).values()
    if isinstance(call, type) and issubclass(call, OpCall) and hasattr(call, "target")
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_the_fields_of_a_view_are_the_arguments_of_its_operator(call):
    schema = [argument.name for argument in call.target._schema.arguments]
    assert [field.name for field in fields(call)] == schema


def test_every_operator_has_a_view():
    operators = {name.removeprefix("qcompile_onnx::") for name in torch._C._dispatch_get_all_op_names()
                 if name.startswith("qcompile_onnx::")}  # fmt: skip
    assert {call.target._schema.name.removeprefix("qcompile_onnx::") for call in CALLS} == operators


def test_blocks_are_scaled_around_their_zero_point():
    codes = torch.tensor([[[0x21, 0x43]]], dtype=torch.uint8)  # 1, 2, 3, 4: low nibble first
    scales = torch.tensor([[0.5]])
    assert dequantize_blocks(codes, scales, None, 4, 4).tolist() == [[-3.5, -3.0, -2.5, -2.0]]
    packed_zero, float_zero = torch.tensor([[0x03]], dtype=torch.uint8), torch.tensor([[1.5]])
    assert dequantize_blocks(codes, scales, packed_zero, 4, 4).tolist() == [[-1.0, -0.5, 0.0, 0.5]]
    assert dequantize_blocks(codes, scales, float_zero, 4, 4).tolist() == [[-0.25, 0.25, 0.75, 1.25]]
    y = nbits_linear(torch.ones(1, 3), codes, scales, None, torch.tensor([10.0]), 3, 4, 4)
    assert y.tolist() == [[1.0]], "the fourth column is beyond K"


@pytest.mark.parametrize("zero", ["none", "int"])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("shifted", [False, True])
def test_an_int8_linear_quantizes_its_input(zero, per_row, shifted):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 24) + 0.3, torch.randint(-127, 128, (24, 5), dtype=torch.int8)
    scale, bias = torch.rand(5) + 0.1, torch.randn(5)
    q = quantize_tensor(x, Format("int8", "row" if per_row else "tensor", zero=zero))
    want = q.dequantize() @ (weight.float() * scale) + bias
    stored = (weight.short() + 128).to(torch.uint8) if shifted else weight
    sums = None if zero == "none" else scale * weight.sum(0)
    assert torch.allclose(int8_linear(x, stored, scale, sums, bias, per_row), want, atol=1e-2, rtol=1e-4)


def test_two_level_scales_make_one_int8_weight():
    """The product by 4-bit codes and the one in int8 have the same weight."""
    torch.manual_seed(0)
    codes, row = torch.randint(0, 256, (5, 2, 8), dtype=torch.uint8), torch.rand(5) + 0.1
    scales = torch.randint(1, 15, (5, 2)) * row[:, None]
    weight = dequantize_blocks(codes, scales, None, 4, 16)
    x = torch.randint(-127, 128, (3, 32)).float()
    x[:, 0] = 127  # a scale of one: activations are their own codes
    got = dual_linear(x, codes, scales, None, None, 32, 4, 16, row, True)
    assert torch.allclose(got, x @ weight.t(), rtol=1e-4, atol=1e-1)


def test_a_dual_linear_by_its_codes_only_has_the_same_weight():
    sizes = dict(k=32, bits=4, block=16)
    call = DualLinearCall("x", "codes", "scales", "zeros", "bias", **sizes, row_scale="row", per_row=True)
    decode = call.without_int8()
    assert decode.arguments == ("x", "codes", "scales", "zeros", "bias", 32, 4, 16)
    assert call.options == (32, 4, 16, True), "what linears that are packed must agree on"
    assert call.with_operands(bias=None).bias is None
