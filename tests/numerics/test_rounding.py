"""The laws of rounding to nearest, for every format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics_formats import FORMATS

from qcompile.numerics import rounding
from qcompile.numerics.format import Format
from qcompile.numerics.qparams import expand_qparams
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_matrix, quantize_tensor
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
    if form.dual:
        scale = (q.scale * expand_groups(q.group_scale.float(), form, w.shape[1])).abs()
        # an integer group scale is up to half a level-1 unit short for each of 15 codes: 7.5 units
        assert bool((error <= 1.01 * scale + 8 * q.scale + 1e-7).all())
        return
    scale = expand_groups(q.scale, form, w.shape[1])
    slack = 1.0 if form.zero == "int" else 0.5  # a rounded zero point shifts all values by half a scale more
    assert bool((error <= scale * slack * (1 + 1e-5) + 1e-7).all())


@given(weights(), st.sampled_from([f for f in FORMATS if "dual" not in f and "zero" not in f and "/m" not in f]))
def test_rounding_twice_is_rounding_once(w, text):
    once = quantize_tensor(w, Format.parse(text)).dequantize()
    twice = quantize_tensor(once, Format.parse(text)).dequantize()
    assert torch.allclose(once, twice, rtol=1e-5, atol=1e-9)


E2M1 = np.float32([s * v for s in (-1, 1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)])
ONE_LEVEL = [f for f in FORMATS if "dual" not in f and "/m" not in f]


def by_hand(values, form):
    """Scale, zero point, codes and dequantized values of one group, as format.py writes them, in float32."""
    low, high = min(0, values.min()), max(0, values.max())
    peak = np.abs(values).max()
    scale = peak / np.float32(form.max_value) if form.zero == "none" else (high - low) / np.float32(form.qmax)
    scale = scale if scale > 0 else np.float32(1)
    if form.dtype == "fp8":
        return scale, 0, None, torch.from_numpy(values / scale).to(torch.float8_e4m3fn).float().numpy() * scale
    if form.dtype == "fp4":
        return scale, 0, None, E2M1[np.abs(values[:, None] / scale - E2M1).argmin(-1)] * scale
    zero = -low / scale if form.zero == "float" else np.rint(-low / scale) if form.zero == "int" else np.float32(0)
    codes = np.rint(values / scale + zero) if form.zero == "float" else np.rint(values / scale) + zero
    codes = codes.clip(form.qmin, form.qmax)
    return scale, zero, codes, (codes - zero) * scale


@pytest.mark.parametrize("text", ONE_LEVEL)
def test_codes_scales_and_zero_points_are_those_of_the_header(text):
    """Of rows of either sign, of both, of none, of halves of a scale; the last group is ragged."""
    form = Format.parse(text)
    w = torch.randn(6, 40)
    w[1], w[2], w[3] = w[1].abs() + 1, -w[2].abs() - 1, 0
    w[4] = torch.arange(40) - 20 + 0.5
    w[4, ::8] = form.max_value  # the other values are halves, at a scale of one where there is no zero point
    middle = form.qmax // 2  # odd: halves beside it are rounded before a zero point is added
    w[5] = torch.arange(40) % 3 - 1.5
    w[5, ::8], w[5, 1::8] = -middle, form.qmax - middle
    q = quantize_tensor(w, form)
    width = {"tensor": 240, "row": 40}.get(form.per, form.group)
    groups = [part for row in (w.reshape(1, -1) if form.per == "tensor" else w) for part in row.split(width)]
    scales, zeros, codes, values = zip(*(by_hand(group.numpy(), form) for group in groups), strict=True)
    assert q.scale.flatten().tolist() == list(scales)
    assert q.scale.shape == (() if form.per == "tensor" else (6, form.groups(40)))
    assert torch.equal(q.dequantize().flatten(), torch.from_numpy(np.concatenate(values)))
    assert (q.zero is None) == (form.zero == "none") and (q.zero is None or q.zero.flatten().tolist() == list(zeros))
    if not form.is_float:
        assert q.codes.flatten().tolist() == np.concatenate(codes).tolist()


@pytest.mark.parametrize("text", [*FORMATS, "int4/group16/smooth"])
def test_parts_are_dense_and_bfloat16_values_are_rounded_as_float32(text):
    """Halves of a bfloat16 quotient are none of the float32 one."""
    w, form = torch.randn(8, 40).bfloat16(), Format.parse(text)
    q, wide = quantize_tensor(w, form), quantize_tensor(w.float(), form)
    for part, want in zip(q.parts, wide.parts, strict=True):
        assert (part is None) == (want is None)
        assert part is None or (part.is_contiguous() and part.dtype == want.dtype)
        assert part is None or torch.equal(part.float(), want.float())


def test_zero_rows_stay_zero():
    for text in [*FORMATS, "int4/group16/smooth"]:
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


def test_smoothing_by_hand():
    """Of channels whose values are all zeros, of a token of zeros, and of one token alone, which is not smoothed."""
    x, form = torch.randn(6, 40), Format.parse("int4/group16/smooth")
    x[:, 16:32] = 0
    x[2] = 0
    q = quantize_tensor(x, form)
    peaks = torch.stack([group.abs().amax(1) for group in x.split(16, 1)], 1)  # [T, groups]
    channels = peaks.amax(0)
    channels[1] = 1
    scale = (peaks / channels).amax(1, keepdim=True) / 7 * channels
    scale[2] = 1
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.codes.float(), (x / expand_groups(scale, form, 40)).round())
    alone = quantize_tensor(x[0], form)
    assert torch.equal(alone.scale, (x[0].abs().max() / 7).expand(3))
    token = quantize_tensor(x[:1], form)  # one token: its own peaks are the channels'
    assert torch.allclose(token.scale, torch.where(peaks[:1] > 0, peaks[:1], 1) / 7)


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (2, 0, 32), (0,)])
@pytest.mark.parametrize("text", FORMATS)
def test_no_values_are_no_codes(text, shape):
    form = Format.parse(text)
    q, one = quantize_tensor(torch.zeros(shape), form), quantize_tensor(torch.ones(1, 1), form)
    assert q.codes.shape == shape and q.dequantize().shape == shape
    for empty, full in zip(q.parts, one.parts, strict=True):
        assert (empty is None) == (full is None) and (empty is None or empty.dtype == full.dtype)
    groups = form.groups(shape[-1])
    assert q.scale.shape == (() if form.per == "tensor" else (*shape[:-1], 1 if form.two_level else groups))
    for part in (q.zero, q.group_scale):
        assert part is None or part.shape == (*shape[:-1], groups)


@pytest.mark.parametrize(
    "values, count",
    [
        ((1.0, torch.nan, 2.0), 1),
        ((torch.inf, 1.0, -2.0), 1),
        ((3.0, -torch.inf, 1.0), 1),
        ((torch.nan, -torch.inf, torch.inf), 3),
    ],
)
def test_what_no_scale_can_cover_is_counted(values, count):
    with pytest.raises(ValueError, match=f"{count} NaN or Inf of 6 values, which no scale can cover. Fix: repair"):
        quantize_tensor(torch.tensor([[0.0, 5.0, 1.0], values]), Format("int8"))


def test_float64_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="1 NaN or Inf of 2"):
        quantize_tensor(torch.tensor([[1.0, 1e300]], dtype=torch.float64), Format("int8"))


STORED = [
    f"{form}/{scale}"
    for form in (
        "int8/row", "int8/tensor", "int8/row/zero", "int4/group16", "int4/group16/zero", "int4/group16/floatzero",
        "int3/group32/zero", "int2/row", "fp8/row", "fp4/group16",
    )
    for scale in ("bf16", "f16")
]  # fmt: skip


@given(weights(), st.sampled_from(STORED), st.booleans())
def test_codes_are_the_nearest_for_the_scale_that_is_stored(w, text, clip):
    form = Format.parse(text)
    try:
        q = quantize_tensor(w, form, clip=clip)
    except ValueError as error:
        assert form.scale == "f16" and "is beyond float16" in str(error) and float(w.abs().max()) > 65000
        return
    assert q.scale.dtype == form.scale_dtype and bool((q.scale != 0).all()) and bool(torch.isfinite(q.scale).all())
    scale, zero, _, _ = expand_qparams(q)
    assert scale.dtype == torch.float32
    # What a reader of the file computes, in float32 of the stored bits.
    if form.is_float:
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        table = torch.from_numpy(E2M1) if form.dtype == "fp4" else table[torch.isfinite(table)]
    else:
        table = torch.arange(form.qmin, form.qmax + 1).float()
    step = scale if zero is None else scale.clone()
    candidates = (table - (0 if zero is None else zero[..., None])) * step[..., None]
    nearest = (candidates - w[..., None]).abs().amin(-1)
    error = (q.dequantize() - w).abs()
    # The scale and the quotient are rounded to float32 on the way: ties may fall to either side.
    assert bool((error <= nearest * (1 + 1e-4) + scale.abs() * 2e-4).all())


@given(weights(), st.sampled_from([text for text in STORED if "floatzero" in text]))
def test_offsets_of_float_zero_points_are_values_of_the_stored_dtype(w, text):
    form = Format.parse(text)
    try:
        q = quantize_tensor(w, form)
    except ValueError:
        return
    offset = q.scale.float() * q.zero
    stored = offset.to(form.scale_dtype).float()
    assert q.zero.dtype == torch.float32
    inside = torch.isfinite(stored)
    assert bool(((offset - stored).abs() <= 2**-22 * offset.abs())[inside].all())


@given(weights(), st.sampled_from(sorted({*FORMATS, *STORED})), st.booleans(), st.integers(1, 400))
def test_a_matrix_block_by_block_has_the_same_parts(w, text, clip, block):
    form = Format.parse(text)
    stack = torch.stack([w, w.flip(0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_BLOCK", block)
        for weight in (w, stack, w[0]):
            try:
                whole = quantize_tensor(weight, form, clip=clip).stored_parts
            except ValueError:
                with pytest.raises(ValueError, match="Fix"):
                    quantize_matrix(weight, form, clip=clip)
                continue
            for part, expected in zip(quantize_matrix(weight, form, clip=clip), whole, strict=True):
                assert part is None if expected is None else torch.equal(part, expected)


@pytest.mark.parametrize("clip", [False, True])
def test_k_quants_of_a_matrix_block_by_block(clip, monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK", 512)
    form, weight, importance = Format.parse("int4/group32/k6"), torch.randn(5, 512), torch.rand(512)
    whole = quantize_tensor(weight, form, clip=clip, importance=importance).stored_parts
    for part, expected in zip(quantize_matrix(weight, form, clip=clip, importance=importance), whole, strict=True):
        assert torch.equal(part, expected)


def test_what_a_matrix_cannot_have_is_counted_in_all_blocks(monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK", 8)
    bad = torch.zeros(6, 8, dtype=torch.float64)
    bad[0, 0], bad[5, 3] = torch.nan, 1e300
    with pytest.raises(ValueError, match="holds 2 NaN or Inf of 48 values"):
        quantize_matrix(bad, Format("int8"))


def test_a_tiny_scale_stays_above_zero_in_float16():
    q = quantize_tensor(torch.tensor([[1e-9, -1e-9]]), Format.parse("int8/row/f16"))
    assert q.scale.tolist() == [[2.0**-24]] and not q.dequantize().any()


def test_a_scale_beyond_float16_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"the scale 7.87e\+04 of format int8/row/f16 is beyond float16.*Fix"):
        quantize_tensor(torch.tensor([[1e7, 0.0]]), Format.parse("int8/row/f16"))
    assert torch.isfinite(quantize_tensor(torch.tensor([[1e7, 0.0]]), Format.parse("int8/row/bf16")).scale).all()


ACTS = ["int8/row", "int8/row/zero", "int4/group16", "fp8/row", "int8/tensor", "int4/group16/zero"]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_checked_stays_nan_and_touches_no_other_group(act, bad):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    form = Format.parse(act)
    want = quantize_tensor(x, form).dequantize()
    x[1, 3] = bad
    got = quantize_tensor(x, form, check=False).dequantize()
    assert bool(got[1, 3].isnan())
    if form.per != "tensor":
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
