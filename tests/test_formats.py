"""Formats: the laws of rounding, packing and the two-level int4."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.bit_packing import pack, unpack
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import constrain, decode_e2m1, encode_e2m1
from qcompile.numerics.qtensor import expand_groups, int8_codes, load_codes
from qcompile.numerics.rounding import (
    dequantize_with_qparams,
    expand_qparams,
    fake_quantize,
    quantize_tensor,
    quantize_with_qparams,
)
from qcompile.testing import weights

FORMATS = [
    "int8/row", "int8/tensor", "int8/row/zero", "int4/group16", "int4/group16/zero", "int4/group16/floatzero",
    "int4/group16/zero/dual", "int4/group16/dual", "int3/group32/zero", "int2/group8", "int2/row", "fp8/row",
    "fp8/tensor", "fp4/row", "fp4/group16", "fp4/group16/m1", "fp4/group16/m2", "fp4/group16/m1ceil",
    "fp4/group16/m2ceil",
]  # fmt: skip


@pytest.mark.parametrize("text", FORMATS)
def test_text_round_trip(text):
    assert str(Format.parse(text)) == text.replace("/zero", "/zero")
    assert Format.parse(str(Format.parse(text))) == Format.parse(text)


@given(weights(), st.sampled_from(FORMATS))
def test_rounding_error_is_at_most_half_a_step(w, text):
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
    step = expand_groups(q.scale, form, w.shape[1])
    if form.dual:
        step = (q.scale * expand_groups(q.group_scale.float(), form, w.shape[1])).abs()
        # an integer group scale is up to half a level-1 unit short for each of 15 codes: 7.5 units
        assert bool((error <= 1.01 * step + 8 * q.scale + 1e-7).all())
        return
    slack = 1.0 if form.zero == "int" else 0.5  # a rounded zero point shifts the grid by half a step more
    assert bool((error <= step * slack * (1 + 1e-5) + 1e-7).all())


@given(weights(), st.sampled_from(FORMATS))
def test_codes_are_in_range_and_stored_losslessly(w, text):
    form = Format.parse(text)
    q = quantize_tensor(w, form)
    if not form.is_float:
        assert int(q.codes.min()) >= form.qmin and int(q.codes.max()) <= form.qmax
    back = load_codes(q.stored(), form, w.shape[1])
    assert torch.equal(back.float(), q.codes.float())
    assert q.stored().shape[1] == -(-w.shape[1] * form.bits // 8)


@given(weights(), st.sampled_from([f for f in FORMATS if "dual" not in f and "zero" not in f and "/m" not in f]))
def test_rounding_twice_is_rounding_once(w, text):
    once = quantize_tensor(w, Format.parse(text)).dequantize()
    twice = quantize_tensor(once, Format.parse(text)).dequantize()
    assert torch.allclose(once, twice, rtol=1e-5, atol=1e-9)


@given(weights(), st.booleans(), st.booleans())
def test_dual_fits_int8(w, zero, clip):
    form = Format.parse("int4/group16/zero/dual" if zero else "int4/group16/dual")
    q = quantize_tensor(w, form, clip=clip)
    steps = expand_groups(q.group_scale, form, w.shape[1]).int()
    inner = (q.codes.int() - (expand_groups(q.zero, form, w.shape[1]).int() if zero else 0)) * steps
    assert int(inner.abs().max()) <= 127
    assert torch.equal(int8_codes(q.codes, q.zero, q.group_scale, form).int(), inner)
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
    w[:, 100:140] *= 0.05  # a group whose scale is a few steps of the row's
    plain, dual = (
        (quantize_tensor(w, Format.parse(f"int4/group32{zero}{kind}"), clip=clip).dequantize() - w).norm()
        for kind in ("", "/dual")
    )
    assert dual < 1.06 * plain


@given(weights(), st.sampled_from([f for f in FORMATS if "tensor" not in f and "/m" not in f]))
def test_clip_never_increases_its_own_loss(w, text):
    form = Format.parse(text)
    loss = [float((quantize_tensor(w, form, clip=c).dequantize() - w).abs().pow(2.4).sum()) for c in (False, True)]
    assert loss[1] <= loss[0] * (1 + 1e-4)


@given(
    weights(),
    st.sampled_from(["int2/row", "int4/row/zero", "int4/row/floatzero", "int8/row", "fp8/row", "fp4/row"]),
)
def test_clip_is_the_best_of_its_ranges(w, text):
    form = Format.parse(text)
    found = (quantize_tensor(w, form, clip=True).dequantize() - w).abs().pow(2.4).sum(1)
    for shrink in range(21):
        max_value = 1 - shrink / 100
        low, high = w.amin(1, keepdim=True).clamp_max(0) * max_value, w.amax(1, keepdim=True).clamp_min(0) * max_value
        if form.zero == "none":
            high = torch.maximum(-low, high)
            low = -high
        one = (quantize_tensor(torch.clamp(w, low, high), form).dequantize() - w).abs().pow(2.4).sum(1)
        assert bool((found <= one * (1 + 1e-3) + 1e-12).all()), shrink


@given(weights(), st.sampled_from(["int2/row", "int3/row", "int4/row"]))
def test_clip_tries_the_extreme_on_the_code_that_only_one_side_has(w, text):
    form = Format.parse(text)
    found = (quantize_tensor(w, form, clip=True).dequantize() - w).abs().pow(2.4).sum(1)
    extreme = w.gather(1, w.abs().argmax(1, keepdim=True))
    for shrink in range(21):
        scale = extreme * (1 - shrink / 100) / form.qmin
        one = (fake_quantize(w, torch.where(scale == 0, 1, scale), None, form) - w).abs().pow(2.4).sum(1)
        assert bool((found <= one * (1 + 1e-3) + 1e-12).all()), shrink


@given(weights(), st.sampled_from(FORMATS))
def test_a_number_on_the_grid_is_its_code_decoded(w, text):
    q = quantize_tensor(w, Format.parse(text))
    scale, zero, low, high = expand_qparams(q)
    x = 1.5 * w.flip(0)  # other numbers, some beyond the range
    codes = quantize_with_qparams(x, scale, zero, q.format)
    if low is not None:
        codes = torch.minimum(torch.maximum(codes, low), high)
    found = fake_quantize(x, scale, zero, q.format, low, high)
    assert torch.equal(found, dequantize_with_qparams(codes, scale, zero, q.format))
    assert torch.equal(quantize_with_qparams(found, scale, zero, q.format).float(), codes.float())


def test_ragged_last_group():
    w = torch.randn(3, 576)
    q = quantize_tensor(w, Format.parse("int4/group128"))
    assert q.scale.shape == (3, 5)
    tail = quantize_tensor(w[:, 512:], Format.parse("int4/group64"))
    assert torch.equal(q.dequantize()[:, 512:], tail.dequantize())


def test_e2m1_is_the_standard_format():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(16, dtype=torch.uint8)
    assert decode_e2m1(codes).tolist() == [*values, *[-v for v in values]]
    assert torch.equal(encode_e2m1(decode_e2m1(codes)), codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 99.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert decode_e2m1(encode_e2m1(-ties.double())).tolist() == [-0.0, -1, -1, -2, -2, -4, -4, -6]


@given(st.floats(-8, 8))
def test_e2m1_is_the_nearest(x):
    got = float(decode_e2m1(encode_e2m1(torch.tensor([x])))[0])
    assert abs(got - x) <= min(abs(v * s - x) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (1, -1)) + 1e-6


def test_e2m1_times_a_power_of_two_is_e4m3():
    """ZeroQuant-FP's cast: exact for every exponent that `constrain` gives, and not one further."""
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    exact = [bool((values * 2.0**k == (values * 2.0**k).to(torch.float8_e4m3fn).float()).all()) for k in range(-9, 8)]
    assert exact == [False, *[True] * 15, False]  # -8 .. 6
    _, exponents = constrain(torch.tensor([[1.0, 1e-9, 0.3]]), "m2")
    assert exponents.tolist() == [[0, -8, -2]]


def test_free_scales_beat_constrained_ones_and_nearest_beats_the_papers_ceil():
    w = torch.distributions.StudentT(5.0).sample((64, 16 * 256))
    loss = {m: float((quantize_tensor(w, Format.parse(f"fp4/group256{m}")).dequantize() - w).square().sum())
            for m in ("", "/m1", "/m2", "/m1ceil", "/m2ceil")}  # fmt: skip
    assert loss[""] < loss["/m1"] < 1.25 * loss[""] and loss[""] < loss["/m2"] < 1.25 * loss[""], loss
    assert loss["/m2"] < loss["/m2ceil"] < loss["/m1ceil"], loss


def test_ceil_constraints_are_the_papers():
    scale = torch.tensor([[3.0, 1.1, 0.5]])
    row, exponent = constrain(scale, "m1ceil")
    assert (row * 2.0**exponent).tolist() == [[4, 2, 0.5]]
    row, exponent = constrain(scale, "m2ceil")
    assert (row * 2.0**exponent).tolist() == [[3, 0.75, 0.375]]  # s_max / 2^ceil(log2(s_max / s))


@given(st.integers(0, 999))
def test_smooth_scales_have_rank_one_and_pivots_do_not_matter(seed):
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


def test_zero_rows_stay_zero():
    for text in FORMATS:
        assert not quantize_tensor(torch.zeros(2, 20), Format.parse(text)).dequantize().any()


def test_nibble_layout():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[0b11010001, 0b0]]


@given(st.integers(1, 40), st.sampled_from([2, 3, 4, 8]), st.integers(0, 999))
def test_unpack_is_the_inverse(k, bits, seed):
    codes = torch.randint(0, 2**bits, (3, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack(pack(codes, bits), bits, k), codes)


@pytest.mark.parametrize(
    "text",
    [
        "int5/row",
        "int4/grup128",
        "fp8/row/zero",
        "int8/row/dual",
        "int4/row/dual",
        "fp4/row/m2",
        "int4/group16/m1",
        "fp4/group16/zero",
        "fp8/group16/smooth",
        "int4/group16/zero/smooth",
        "int4/row/smooth",
    ],
)
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError):
        Format.parse(text)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_tensor(torch.tensor([[1.0, bad]]), Format("int8"))


@given(st.integers(0, 999), st.sampled_from(["int4/group32", "int3/group32", "int8/group32"]))
def test_a_clip_search_may_put_the_extreme_on_the_code_below_zero(seed, form):
    """Symmetric codes reach -8 but only 7: the searched scale may be negative; never worse than max / 7."""
    form = Format.parse(form)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))
    x[0, 0] = 4.0  # alone, on the side of seven codes
    plain, searched = quantize_tensor(x, form), quantize_tensor(x, form, clip=True)

    def cost(q):
        return (q.dequantize() - x).abs().pow(2.4).unflatten(-1, (2, 32)).sum(-1)

    assert bool((cost(searched) <= cost(plain) * (1 + 1e-5)).all())
    assert int(searched.codes.min()) >= form.qmin and int(searched.codes.max()) <= form.qmax
    assert bool((searched.scale < 0).any()) == (form.bits < 8)
