"""Quantizing with given scales and zero points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_formats import FORMATS

from qcompile.numerics.format import Format
from qcompile.numerics.qparams import (
    choose_qparams,
    dequantize_with_qparams,
    expand_qparams,
    fake_quantize,
    quantize_with_qparams,
)
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor
from qcompile.testing import weights


@given(weights(), st.sampled_from(FORMATS))
def test_fake_quantize_is_quantize_and_dequantize(w, text):
    q = quantize_tensor(w, Format.parse(text))
    scale, zero, low, high = expand_qparams(q)
    x = 1.5 * w.flip(0)  # other values, some beyond the range
    codes = quantize_with_qparams(x, scale, zero, q.format)
    if low is not None:
        codes = torch.minimum(torch.maximum(codes, low), high)
    found = fake_quantize(x, scale, zero, q.format, low, high)
    assert torch.equal(found, dequantize_with_qparams(codes, scale, zero, q.format))
    assert torch.equal(quantize_with_qparams(found, scale, zero, q.format).float(), codes.float())


@given(st.floats(-5, 0), st.floats(0, 5), st.sampled_from(["int4/row/zero", "int8/row/zero", "int4/row/floatzero"]))
def test_chosen_parameters_map_the_range_onto_the_codes(low, high, text):
    form, ends = Format.parse(text), torch.tensor([low, high])
    scale, zero = choose_qparams(ends[:1], ends[1:], form)
    codes = quantize_with_qparams(ends, scale, zero, form)
    if high - low > 1e-20:
        assert abs(codes[0].item() - form.qmin) <= 1 and abs(codes[1].item() - form.qmax) <= 1
    assert bool(((dequantize_with_qparams(codes, scale, zero, form) - ends).abs() <= 1.01 * scale).all())


def test_a_range_of_zeros_has_scale_one():
    zeros = torch.zeros(2)
    assert choose_qparams(zeros, zeros, Format("int8"))[0].tolist() == [1, 1]
    scale, zero = choose_qparams(zeros, zeros, Format("int8", zero="int"))
    assert scale.tolist() == [1, 1] and zero.tolist() == [0, 0]


def test_two_level_codes_are_bounded_where_int8_ends():
    """Of every group scale and zero point: the codes whose s (q - z) fits int8, and not one less."""
    form = Format.parse("int4/group2/zero/dual")
    group_scale = torch.arange(1, 128, dtype=torch.int8).repeat_interleave(16)[:, None]
    zero = torch.arange(16, dtype=torch.uint8).repeat(127)[:, None]
    rows = len(zero)
    q = QTensor(torch.zeros(rows, 2, dtype=torch.uint8), torch.full((rows, 1), 0.5), zero, group_scale, form)
    scale, zeros, low, high = expand_qparams(q)
    codes = torch.arange(16)
    fits = ((codes - zero.int()) * group_scale.int()).abs() <= 127
    assert torch.equal(low[:, 0].int(), torch.where(fits, codes, 99).amin(1))
    assert torch.equal(high[:, 0].int(), torch.where(fits, codes, -1).amax(1))
    far = torch.tensor([[-1e4, 1e4]]).expand(rows, 2).contiguous()
    inner = fake_quantize(far, scale, zeros, form, low, high) / 0.5
    assert int(inner.abs().max()) <= 127


@pytest.mark.parametrize("form", [f for f in FORMATS if Format.parse(f).per != "tensor"])
def test_expanded_parameters_reproduce_the_dequantized_values(form):
    q = quantize_tensor(torch.randn(6, 80), Format.parse(form))
    scale, zero, low, high = expand_qparams(q)
    assert torch.allclose(dequantize_with_qparams(q.codes, scale, zero, q.format), q.dequantize(), rtol=1e-5, atol=1e-6)
    if low is not None:
        assert bool((q.codes >= low).all() and (q.codes <= high).all())
