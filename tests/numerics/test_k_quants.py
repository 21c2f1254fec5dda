"""K-quants: to nearest as the header says, and a search that never loses to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import k_quants
from qcompile.numerics.format import Format
from qcompile.numerics.k_quants import check_k6_range
from qcompile.numerics.k_scales import steps_and_offsets
from qcompile.numerics.rounding import quantize_tensor

K6 = Format.parse("int4/group32/k6")


def awkward(seed, rows=6, columns=512, size=1.0):
    """Groups of one sign, of zeros, narrow, far from zero, with outliers, and of one value."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * size
    w[:, 32:64], w[:, 64:96] = w[:, 32:64].abs(), -w[:, 64:96].abs() - size
    w[:, 96:128], w[:, 128:160] = 0, w[:, 128:160] * 1e-3
    w[:, 160:192], w[:, 192] = -0.3 * size, 50 * size
    w[1, 256:], w[2] = 0, 0
    return w


def block_errors(w, q, importance=None):
    """sum v e^2 of each block."""
    error = (q.dequantize() - w).square() * (1 if importance is None else importance)
    return error.unflatten(1, (-1, 256)).sum(-1)


def by_hand(row):
    """Values of a block of 256, to nearest, as k_quants.py writes it."""
    groups = row.numpy().reshape(8, 32)
    low = np.minimum(groups.min(1), 0)
    step, offset = ((np.maximum(groups.max(1), low) - low) / np.float32(15)).astype(np.float32), -low
    d = np.float32(np.float16(step.max() / np.float32(63))) if step.max() > 0 else np.float32(1)
    dmin = np.float32(np.float16(offset.max() / np.float32(63)))
    sc = np.rint(step / d).clip(1, 63)
    m = np.rint(offset / dmin).clip(0, 63) if dmin > 0 else np.zeros(8)
    s, o = ((d * sc).astype(np.float32)[:, None], (dmin * m).astype(np.float32)[:, None])
    return (np.rint((groups + o) / s).clip(0, 15) * s - o).reshape(-1)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_nearest_is_that_of_the_header(size):
    w = awkward(0, size=size)
    values = quantize_tensor(w, K6).dequantize()
    blocks = (part.unflatten(1, (2, 256)).flatten(0, 1) for part in (w, values))
    for row, found in zip(*blocks, strict=True):
        assert np.array_equal(by_hand(row), found.numpy())


@given(st.integers(0, 2**20), st.booleans(), st.sampled_from([1e-3, 1.0, 30.0]))
def test_parts_are_in_range_and_codes_the_nearest(seed, clip, size):
    w = awkward(seed, size=size)
    q = quantize_tensor(w, K6, clip=clip)
    assert (q.codes.dtype, q.scale.dtype, q.zero.dtype, q.group_scale.dtype) == (
        torch.uint8, torch.float16, torch.uint8, torch.int8,
    )  # fmt: skip
    assert int(q.codes.max()) <= 15 and int(q.zero.max()) <= 63
    assert 1 <= int(q.group_scale.min()) and int(q.group_scale.max()) <= 63
    assert bool((q.scale[:, 0::2] > 0).all()) and bool((q.scale[:, 1::2] >= 0).all())
    step, offset = (p.repeat_interleave(32, 1) for p in steps_and_offsets(q.scale, q.zero, q.group_scale))
    inside = (w >= -offset) & (w <= 15 * step - offset)
    assert bool(((q.dequantize() - w).abs() <= step * 0.5001 + 1e-6 * size)[inside].all())
    assert float(inside.float().mean()) > 0.9


@given(st.integers(0, 2**20), st.booleans())
def test_the_search_is_never_worse_than_nearest_and_usually_much_better(seed, weighted):
    w = awkward(seed)
    importance = torch.rand(512, generator=torch.Generator().manual_seed(seed)) ** 4 + 0.01 if weighted else None
    plain, found = (
        block_errors(w, quantize_tensor(w, K6, clip=clip, importance=importance), importance) for clip in (False, True)
    )
    assert bool((found <= plain * (1 + 1e-5)).all())
    ordinary = torch.randn(32, 512, generator=torch.Generator().manual_seed(seed))
    nearest, searched = (
        block_errors(ordinary, quantize_tensor(ordinary, K6, clip=clip)).sum() for clip in (False, True)
    )
    assert float(searched) < 0.87 * float(nearest)


def test_six_bits_lose_little_to_float_scales_and_offsets():
    w = torch.randn(64, 1536) * torch.rand(64, 1536).exp()
    k6, free = (
        float((quantize_tensor(w, Format.parse(text), clip=True).dequantize() - w).norm())
        for text in ("int4/group32/k6", "int4/group32/floatzero/f16")
    )
    assert k6 < free, "least squares find better offsets than a clip search"


def test_columns_of_more_importance_have_less_error():
    w, importance = torch.randn(64, 256), torch.ones(256)
    importance[::32] = 1000
    even, aimed = (quantize_tensor(w, K6, clip=True, importance=v).dequantize() - w for v in (None, importance))
    assert float(aimed[:, ::32].norm()) < 0.7 * float(even[:, ::32].norm())
    assert torch.equal(
        quantize_tensor(w, K6, clip=True, importance=1e6 * importance).codes,
        quantize_tensor(w, K6, clip=True, importance=importance).codes,
    )  # only the ratio counts
    dead = torch.zeros(256)
    assert torch.equal(quantize_tensor(w, K6, clip=True, importance=dead).dequantize() - w, even)


def test_leading_dimensions_are_rows():
    w = awkward(3).unflatten(0, (2, 3))
    q, flat = quantize_tensor(w, K6, clip=True), quantize_tensor(w.flatten(0, 1), K6, clip=True)
    assert q.scale.shape == (2, 3, 4) and q.group_scale.shape == q.zero.shape == (2, 3, 16)
    assert torch.equal(q.dequantize().flatten(0, 1), flat.dequantize())
    assert [part.split([2, 4])[1].shape for part in (flat.scale, flat.zero)] == [(4, 4), (4, 16)]


def test_what_has_no_blocks_is_refused():
    with pytest.raises(ValueError, match="has 576 columns, and int4/group32/k6 is in blocks of 256. Fix: use int4/gr"):
        quantize_tensor(torch.randn(2, 576), K6)
    for check in (lambda w: quantize_tensor(w, K6), lambda w: check_k6_range(w, K6)):
        with pytest.raises(ValueError, match="a scale of .* of format int4/group32/k6 is beyond float16"):
            check(torch.randn(2, 256) * 1e8)
    check_k6_range(torch.randn(2, 256) * 1e6, K6)  # which a scale of one level would not hold
    check_k6_range(torch.empty(0, 256), K6)


def test_tiny_values_keep_a_positive_scale():
    q = quantize_tensor(torch.full((1, 256), 1e-7), K6, clip=True)
    assert float(q.scale[0, 0]) == 2.0**-24 and bool(torch.isfinite(q.dequantize()).all())
    assert float(quantize_tensor(torch.zeros(1, 256), K6, clip=True).dequantize().abs().max()) == 0


def test_a_start_that_is_worse_than_nearest_is_dropped():
    x = torch.randn(2, 1, 8, 32)
    weight = torch.ones(1, 8, 32)
    plain = k_quants._rounded(*k_quants._covering(x), K6)
    far = plain._replace(d=plain.d * 1e-4, dmin=plain.dmin * 0, minimum=plain.minimum * 0)
    found = k_quants._searched(x, weight, plain, far, K6)
    error, nearest = (k_quants._block_errors(x, weight, grid) for grid in (found, plain))
    assert bool((error <= nearest).all())


def test_a_line_has_no_offset_below_zero():
    """Of values above zero the best line through all codes would have one; the best through zero is the answer."""
    x = torch.rand(3, 2, 8, 32) + 1
    weight, codes = torch.ones(2, 8, 32), torch.randint(0, 16, x.shape).float()
    step, offset = k_quants._line(*k_quants._sums(x, weight, codes))
    assert torch.equal(offset, torch.zeros_like(offset))
    assert torch.allclose(step, (x * codes).sum(-1) / codes.square().sum(-1))
