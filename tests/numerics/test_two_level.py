"""Two-level int4: it fits int8, and is as good as float group scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import dequantize_to_int8, expand_groups
from qcompile.numerics.rounding import quantize_tensor
from qcompile.testing import weights


@given(weights(), st.booleans(), st.booleans())
def test_dual_fits_int8(w, zero, clip):
    form = Format.parse("int4/group16/zero/dual" if zero else "int4/group16/dual")
    q = quantize_tensor(w, form, clip=clip)
    group_scale = expand_groups(q.group_scale, form, w.shape[1]).int()
    inner = (q.codes.int() - (expand_groups(q.zero, form, w.shape[1]).int() if zero else 0)) * group_scale
    assert int(inner.abs().max()) <= 127
    assert torch.equal(dequantize_to_int8(q.codes, q.zero, q.group_scale, form).int(), inner)
    assert torch.allclose(inner * q.scale, q.dequantize(), rtol=1e-5)


@given(weights(), st.booleans())
def test_without_zero_points_the_largest_group_scale_of_a_row_is_fifteen(w, clip):
    q = quantize_tensor(w, Format.parse("int4/group16/dual"), clip=clip)
    assert torch.equal(q.group_scale.abs().amax(1), torch.full((len(w),), 15, dtype=torch.int8))


def test_row_scales_where_one_group_is_zero_and_one_wants_to_be_clipped_further():
    w = torch.linspace(-0.3, 0.3, 16).repeat(4, 3)
    w[:, 0] = 1  # less than 0.8 of it would be better for the other fifteen
    w[:, 16:32] = 0  # the scale of zeros, one, is none of the row's
    form = Format.parse("int4/group16/dual")
    q = quantize_tensor(w, form, clip=True)
    assert torch.equal(q.group_scale.abs().amax(1), torch.full((4,), 15, dtype=torch.int8))
    assert float((q.dequantize() - w)[:, 32:].abs().max()) < 0.03


@pytest.mark.parametrize("zero", ["/zero", ""])
@pytest.mark.parametrize("clip", [False, True])
def test_dual_is_as_good_as_float_scales(zero, clip):
    w = torch.randn(64, 576) * torch.rand(64, 576).exp()
    w[:, 100:140] *= 0.05  # a group whose scale is a small multiple of the row's
    plain, dual = (
        (quantize_tensor(w, Format.parse(f"int4/group32{zero}{kind}"), clip=clip).dequantize() - w).norm()
        for kind in ("", "/dual")
    )
    assert dual < 1.06 * plain
