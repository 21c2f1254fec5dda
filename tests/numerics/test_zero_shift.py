"""The law of the merge: a constant for each group moves into the zero points, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor
from qcompile.numerics.zero_shift import shift_groups, shift_obstacle

FORMATS = ["int4/group32/zero", "int4/group32", "int4/group48/floatzero", "int8/group32", "int8/group32/zero",
           "int3/group32/zero", "int2/group16", "int3/group200", "int4/group32/f16",
           "int4/group32/floatzero/bf16"]  # fmt: skip


@given(st.sampled_from(FORMATS), st.integers(1, 6), st.integers(1, 130), st.floats(1e-3, 10))
def test_a_shifted_weight_is_the_weight_plus_the_shift(text, n, k, size):
    form = Format.parse(text)
    weight = quantize_tensor(torch.randn(n, k), form)
    delta = size * torch.randn(n, form.groups(k), dtype=torch.float64)
    shifted = shift_groups(weight, delta)
    want = weight.dequantize().double() + expand_groups(delta, form, k)
    assert torch.allclose(shifted.dequantize().double(), want, rtol=0, atol=2e-6 * float(want.abs().max()))
    assert torch.equal(shifted.scale, weight.scale.float()) and shifted.format.zero == "float"
    assert shifted.format.scale == "f32", "its zero points are not those of a 16-bit format"
    assert torch.equal(shifted.codes.int(), weight.codes.int() - form.qmin), "no code moves"


@given(st.sampled_from(FORMATS))
def test_two_shifts_add_and_rounded_zero_points_lose_them(text):
    form = Format.parse(text)
    weight = quantize_tensor(torch.randn(4, 96), form)
    a, b = torch.randn(2, 4, form.groups(96)) * 0.01
    one = shift_groups(shift_groups(weight, a), b).dequantize()
    both = shift_groups(weight, a + b).dequantize()
    assert torch.allclose(one, both, atol=1e-5)
    rounded = shift_groups(weight, a + b)
    rounded = rounded.__class__(rounded.codes, rounded.scale, rounded.zero.round(), None, rounded.format)
    assert not torch.allclose(rounded.dequantize(), both, atol=1e-4), "or the test sees nothing"


@pytest.mark.parametrize(
    "text,why",
    [
        ("int8/row", "one scale for a row"),
        ("int4/tensor", "one scale for a tensor"),
        ("int4/group32/zero/dual", "two-level"),
        ("fp4/group32/m1", "float codes"),
        ("fp8/row", "float codes"),
    ],
)
def test_formats_without_movable_zero_points_are_refused(text, why):
    form = Format.parse(text)
    assert why in shift_obstacle(form)
    with pytest.raises(ValueError, match=why):
        shift_groups(quantize_tensor(torch.randn(4, 64), form), torch.zeros(4, form.groups(64)))


def test_a_shift_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"delta is \[4, 1\], but the weight has \[4, 2\] groups"):
        shift_groups(quantize_tensor(torch.randn(4, 64), Format.parse("int4/group32")), torch.zeros(4, 1))
