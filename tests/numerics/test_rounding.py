"""The laws of rounding to nearest, for every format."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_formats import FORMATS

from qcompile.numerics.format import Format
from qcompile.numerics.qparams import expand_qparams
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor
from qcompile.testing import weights


@given(weights(), st.sampled_from(FORMATS))
def test_rounding_error_is_at_most_half_a_scale(w, text):
    form = Format.parse(text)
    q = quantize_tensor(w, form)
    error = (q.dequantize() - w).abs()
    if form.dtype == "fp8":
        assert bool((error <= w.abs() * 2**-4 + expand_groups(q.scale, form, w.shape[1]) * 2**-10 + 1e-12).all())
        return
    if form.dtype == "fp4":
        scale, _, _, _ = expand_qparams(q)
        inside = w.abs() <= 6 * scale
        assert bool((error <= w.abs() / 4 + scale / 4 + 1e-12)[inside].all())
        assert (
            "m2" in text or text == "fp4/group16/m1" or bool((w.abs() <= 6.001 * scale).all())
        )  # these never saturate
        return
    scale = expand_groups(q.scale, form, w.shape[1])
    if form.dual:
        scale = (q.scale * expand_groups(q.group_scale.float(), form, w.shape[1])).abs()
        # an integer group scale is up to half a level-1 unit short for each of 15 codes: 7.5 units
        assert bool((error <= 1.01 * scale + 8 * q.scale + 1e-7).all())
        return
    slack = 1.0 if form.zero == "int" else 0.5  # a rounded zero point shifts all values by half a scale more
    assert bool((error <= scale * slack * (1 + 1e-5) + 1e-7).all())


@given(weights(), st.sampled_from([f for f in FORMATS if "dual" not in f and "zero" not in f and "/m" not in f]))
def test_rounding_twice_is_rounding_once(w, text):
    once = quantize_tensor(w, Format.parse(text)).dequantize()
    twice = quantize_tensor(once, Format.parse(text)).dequantize()
    assert torch.allclose(once, twice, rtol=1e-5, atol=1e-9)


def test_zero_rows_stay_zero():
    for text in FORMATS:
        assert not quantize_tensor(torch.zeros(2, 20), Format.parse(text)).dequantize().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_tensor(torch.tensor([[1.0, bad]]), Format("int8"))


@given(st.integers(0, 999))
def test_smooth_scales_have_rank_one_and_massive_activations_do_not_matter(seed):
    x = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(seed))
    form = Format.parse("int4/group16/smooth")
    plain = quantize_tensor(x, form)
    assert plain.scale.shape == (2, 7, 3)
    assert bool((torch.linalg.svdvals(plain.scale.double())[:, 1:] < 1e-6).all())
    assert bool(
        ((plain.dequantize() - x).abs() <= 0.5001 * expand_groups(plain.scale, form, 40)).all()
    )  # nothing saturates
    x[0, 3] *= 0.1  # so that this token gives no maximum
    calm, (spiked, others) = quantize_tensor(x, form), (x.clone(), [0, 1, 2, 4, 5, 6])
    spiked[0, 3, 5] = 1000.0
    after = quantize_tensor(spiked, form)
    assert torch.equal(after.codes[0, others], calm.codes[0, others])
    assert torch.equal(after.scale[0, others], calm.scale[0, others])


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (2, 0, 32), (0,)])
@pytest.mark.parametrize("text", FORMATS)
def test_no_values_are_no_codes(text, shape):
    form = Format.parse(text)
    q, one = quantize_tensor(torch.zeros(shape), form), quantize_tensor(torch.ones(1, 1), form)
    assert q.codes.shape == shape and q.dequantize().shape == shape
    for empty, full in zip(q.parts, one.parts, strict=True):
        assert (empty is None) == (full is None) and (empty is None or empty.dtype == full.dtype)


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="1 NaN or Inf of 2"):
        quantize_tensor(torch.tensor([[1.0, 1e300]], dtype=torch.float64), Format("int8"))
