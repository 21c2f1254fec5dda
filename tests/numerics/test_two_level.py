"""Two-level int4: it fits int8, and is as good as float group scales."""

from __future__ import annotations

import numpy as np
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


def test_codes_of_every_range_stay_int8():
    """Nearest, over rows whose groups cover all ranges up to the row's peak on either side."""
    form = Format.parse("int4/group16/zero/dual")
    low = -torch.arange(128.0)[:, None].expand(-1, 128) / 127
    high = torch.arange(128.0)[None].expand(128, -1) / 127
    for sign in (1.0, -1.0):  # the first group sets the row's scale
        rows = torch.zeros(128 * 128, 32)
        rows[:, 0], rows[:, 16], rows[:, 17] = sign, low.flatten(), high.flatten()
        q = quantize_tensor(rows, form)
        inner = (q.codes.int() - expand_groups(q.zero, form, 32).int()) * expand_groups(q.group_scale, form, 32).int()
        assert int(inner.max()) <= 127 and int(inner.min()) >= -127


def awkward():
    """Rows whose groups of 16 are wide, narrow, of one sign, of zeros and ragged."""
    w = torch.randn(40, 88)
    w[:, 16:32] *= 0.01
    w[:, 32:48], w[:, 48:64] = w[:, 32:48].abs() + 1, -w[:, 48:64].abs() - 1
    w[:, 64:80] = 0
    w[2], w[3], w[4] = w[2] - 4, -w[2], 0
    w[5, 0], w[5, 16:32] = 119, torch.arange(16) - 7.5  # halves at scales of one, beside an odd zero point
    w[5, 16], w[5, 31] = -7, 8
    return w


def by_hand(row, zero, shrink=0.0):
    """Row scale, and for each group scale, zero point and codes, as two_level.py writes them, in float32."""
    groups = [row[first : first + 16].numpy() for first in range(0, len(row), 16)]
    peak = row.abs().max().numpy()
    if not peak:
        return np.float32(1), [(1 if zero else 15, 0, np.zeros(len(g))) for g in groups]
    found = []
    if zero:
        scale = peak / np.float32(119)
        for values in (g / scale for g in groups):
            top, bottom = np.float32([max(0, np.rint(values.max())), min(0, np.rint(values.min()))]) * np.float32(
                1 - shrink
            )
            s = np.float32(max(1, np.rint((top - bottom) / np.float32(15))))
            z = np.rint(-bottom / s).clip(0, 15)
            found.append((s, z, (np.rint(values / s) + z).clip(0, 15)))
        return scale, found
    ideal = [np.abs(g).max() / np.float32(7) for g in groups]
    scale = max(ideal) / np.float32(15)
    for wanted, values in zip(ideal, groups, strict=True):
        s = np.float32(np.rint(wanted / scale).clip(1, 15) if wanted else 15)
        found.append((s, 0, np.rint(values / (s * scale)).clip(-8, 7)))
    return scale, found


@pytest.mark.parametrize("zero", [True, False])
def test_both_levels_are_those_of_the_header(zero):
    w = awkward()
    q = quantize_tensor(w, Format.parse("int4/group16/zero/dual" if zero else "int4/group16/dual"))
    for n, row in enumerate(w):
        scale, groups = by_hand(row, zero)
        assert float(q.scale[n]) == float(scale)
        assert q.group_scale[n].tolist() == [s for s, _, _ in groups]
        assert not zero or q.zero[n].tolist() == [z for _, z, _ in groups]
        assert q.codes[n].tolist() == np.concatenate([codes for _, _, codes in groups]).tolist()
    assert q.codes.is_contiguous() and dequantize_to_int8(q.codes, q.zero, q.group_scale, q.format).is_contiguous()


def losses(error):
    return torch.stack([part.abs().pow(2.4).sum(-1) for part in error.split(16, -1)], -1)


def test_a_clip_search_finds_the_best_range_of_level_two():
    w, form = awkward(), Format.parse("int4/group16/zero/dual")
    found = losses(quantize_tensor(w, form, clip=True).dequantize() - w)
    tried = []
    for shrink in range(21):
        rows = [by_hand(row, True, shrink / 100) for row in w]
        values = [np.concatenate([scale * s * (c - z) for s, z, c in groups]) for scale, groups in rows]
        tried.append(losses(torch.from_numpy(np.stack(values)).float() - w))
    assert torch.allclose(found, torch.stack(tried).amin(0), rtol=1e-3, atol=1e-9)


def test_a_clip_search_finds_the_best_neighbor_of_a_group_scale():
    """But for the largest of a row, which stays 15."""
    w, form = torch.randn(40, 88) * torch.rand(40, 88).exp(), Format.parse("int4/group16/dual")
    q = quantize_tensor(w, form, clip=True)
    found, size = losses(q.dequantize() - w), q.group_scale.abs().int()
    for offset in (-1, 1):
        moved = ((size + offset).clamp(1, 15) * q.group_scale.sign()).float()
        scale = expand_groups(moved, form, 88) * q.scale
        other = losses((w / scale).round().clamp(-8, 7) * scale - w)
        # One step from the nearest is tried: the one that was taken may itself be a step away.
        assert bool((found <= other * (1 + 1e-3))[size < 15].float().mean() > 0.97)
    plain = quantize_tensor(w, form, clip=False)
    assert bool((size.amax(1) == 15).all())
    assert float(found.sum()) < float(losses(plain.dequantize() - w).sum())


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
