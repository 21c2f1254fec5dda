"""What an operator reads of a quantized weight means the values that the weight dequantizes to."""

from __future__ import annotations

import pytest
import torch
from linear_cases import unpack_bytes, unpack_group_pairs, unpack_groups, unpack_nibbles

from qcompile.codegen.cpu import linear_weights
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

N = 21
DUALS = ["int4/group{}/dual", "int4/group{}/zero/dual"]


def quantized(text, columns):
    """Random values with some groups far off their middle, so that steps of both signs and all codes occur."""
    w = torch.randn(N, columns) + torch.randn(N, 1)
    return quantize_tensor(w, Format.parse(text), clip=True)


def meaning(q):
    """Of codes, steps and zero points, with the scale of the row where the operators apply it: float64 [N, K]."""
    k, form = q.columns, q.format
    codes, step, zero = linear_weights.grouped_weight(q.stored_parts, form, k)
    group = linear_weights.group_of(form, k)
    values = linear_weights.table_of(form).double()[unpack_nibbles(codes, N, k)]
    shift = 0 if zero is None else unpack_groups(zero, N, k, group) - linear_weights.center(form)
    weight = unpack_groups(step, N, k, group) * (values - shift)
    return weight * q.scale.double() if linear_weights.has_row_scale(form) else weight


@pytest.mark.parametrize("columns", [1, 40, 200])
@pytest.mark.parametrize(
    "text",
    [
        "int4/row", "int4/row/zero", "int4/group32", "int4/group24/zero", "int4/group64/floatzero", "int3/row",
        "int3/group32/zero", "int2/row/zero", "int2/group8", "fp4/row", "fp4/group32", "fp4/group32/m1",
        "fp4/group64/m2", "int4/group32/dual", "int4/group32/zero/dual", "int4/group1024/zero", "int4/group1024/dual",
    ],
)  # fmt: skip
def test_grouped_weights(text, columns):
    q = quantized(text, columns)
    assert linear_weights.takes_nibbles(q.format)
    assert torch.allclose(meaning(q), q.dequantize(torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("columns", [256, 512])
def test_grouped_weights_of_k6_have_one_level(columns):
    q = quantized("int4/group32/k6", columns)
    assert not linear_weights.has_row_scale(q.format) and linear_weights.takes_nibbles(q.format)
    assert torch.allclose(meaning(q), q.dequantize(torch.float64), rtol=0, atol=2e-6)


def test_powers_of_two_are_steps():
    q = quantized("fp4/group32/m2", 96)
    step = linear_weights.grouped_weight(q.stored_parts, q.format, 96)[1]
    assert torch.equal(unpack_groups(step, N, 3, 1), torch.exp2(q.group_scale.double()))
    assert q.group_scale.unique().numel() > 1


@pytest.mark.parametrize("columns", [1, 40, 200, 600])
@pytest.mark.parametrize("group", [32, 128, 256, 4096, 2**40])
@pytest.mark.parametrize("text", DUALS)
def test_dual_weights(text, group, columns):
    """a q - a z is the int8 weight exactly, also of groups that are split, beyond the row, or of negative steps."""
    q = quantized(text.format(group), columns)
    codes, step, offset = linear_weights.dual_weight(q.stored_parts, q.format, columns)
    width = linear_weights.dual_group(q.format, columns)
    assert width <= 248 and width % 8 == 0 and step.dtype == offset.dtype == torch.uint8
    whole = -(-columns // 8) * 8
    assert step.shape[1] == -(-whole // width) and offset.shape[1] == -(-step.shape[1] // 2)
    weight = unpack_groups(step, N, columns, width) * unpack_nibbles(codes, N, columns)
    assert weight.max() <= 255  # what a byte of the products holds
    weight -= unpack_group_pairs(offset, N, columns, width)
    assert torch.equal(weight * q.scale.double(), q.dequantize(torch.float64)) or torch.allclose(
        weight * q.scale.double(), q.dequantize(torch.float64), rtol=1e-7
    )
    assert weight.abs().max() <= 127


@pytest.mark.parametrize("sign", [-1, 1])
def test_steps_of_either_sign_take_every_code(sign):
    form = Format.parse("int4/group16/dual")
    codes = torch.arange(-8, 8, dtype=torch.int8)[None].repeat(N, 2)
    steps = sign * torch.tensor([[15, 1]], dtype=torch.int8).repeat(N, 1)
    q = QTensor(codes, torch.ones(N, 1), None, steps, form)
    packed, step, offset = linear_weights.dual_weight(q.stored_parts, form, 32)
    weight = unpack_groups(step, N, 32, 16) * unpack_nibbles(packed, N, 32) - unpack_group_pairs(offset, N, 32, 16)
    assert torch.equal(weight, steps.double().repeat_interleave(16, 1) * codes)
    assert step[:, :, :].float().unique().tolist() == [0, 1, 15]  # 0: padded channels
    assert torch.equal(meaning(q), weight)


def test_steps_of_one_sign_need_no_zero_points():
    form = Format.parse("int4/group16/dual")
    codes = torch.zeros(N, 32, dtype=torch.int8)
    for steps, has_zero in (([3, 4], False), ([3, -4], True)):
        parts = QTensor(codes, torch.ones(N, 1), None, torch.tensor([steps] * N, dtype=torch.int8), form).stored_parts
        assert (linear_weights.grouped_weight(parts, form, 32)[2] is not None) == has_zero


def test_int8_weights():
    q = quantized("int8", 50)
    (codes,) = linear_weights.int8_weight(q.stored_parts)
    assert torch.equal(unpack_bytes(codes, N, 50), q.codes.double())


@pytest.mark.parametrize(
    "text,takes",
    [
        ("int4/row", True), ("int4/group8", True), ("int2/group24", True), ("fp4/group32/m2", True),
        ("int4/group20", False), ("int4/tensor", False), ("int8", False), ("int8/group64", False), ("fp8", False),
    ],
)  # fmt: skip
def test_which_formats_have_nibbles(text, takes):
    assert linear_weights.takes_nibbles(Format.parse(text)) == takes


def test_a_group_beyond_the_row_takes_no_more_than_the_row():
    for text in ("int4/row", "int4/group128", "int4/group1099511627776"):
        assert linear_weights.group_of(Format.parse(text), 100) == 104
    assert linear_weights.group_of(Format.parse("int4/group64"), 100) == 64
    assert linear_weights.group_of(Format.parse("int4/row"), 0) == 8
