"""Packed weights hold every code where the index formulas of native/linear.h say, and zeros elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import ints, unpack_bytes, unpack_group_pairs, unpack_groups, unpack_nibbles

from qcompile.codegen.cpu.weight_packing import (
    MAX_DUAL_GROUP,
    pack_bytes,
    pack_group_pairs,
    pack_groups,
    pack_nibbles,
    split_groups,
)

sizes = st.integers(0, 70)


def up(value, step):
    return -(-value // step) * step


@given(sizes, sizes)
def test_bytes(n, k):
    w = ints(-128, 127, n, k, dtype=torch.int8)
    packed = pack_bytes(w)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (up(n, 32) // 16, up(k, 4) // 4, 16, 4)
    assert torch.equal(unpack_bytes(packed, n, k), w.double())
    everything = unpack_bytes(packed, up(n, 32), up(k, 4))
    assert everything.count_nonzero() == w.count_nonzero()  # the padding means zero


@given(sizes, sizes)
def test_nibbles(n, k):
    q = ints(0, 15, n, k)
    packed = pack_nibbles(q)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert packed.shape == (up(n, 32) // 16, up(k, 8) // 8, 16, 4)
    assert torch.equal(unpack_nibbles(packed, n, k), q.long())
    assert unpack_nibbles(packed, up(n, 32), up(k, 8)).count_nonzero() == q.count_nonzero()


def test_an_octet_by_hand():
    """Columns 0-3 are low nibbles, 4-7 high ones."""
    packed = pack_nibbles(torch.arange(1, 9, dtype=torch.uint8)[None])
    assert packed[0, 0, 0].tolist() == [0x51, 0x62, 0x73, 0x84]
    assert pack_bytes(torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8))[0, 0, 0].tolist() == [0, 127, 128, 255]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@given(sizes, st.integers(0, 9))
def test_values_of_groups(dtype, n, groups):
    values = ints(1, 255, n, groups).to(dtype)
    packed = pack_groups(values)
    assert packed.dtype == dtype and packed.is_contiguous() and packed.shape == (up(n, 32) // 16, groups, 16)
    assert torch.equal(unpack_groups(packed, n, groups, 1), values.double())
    assert packed.count_nonzero() == values.numel()


@given(sizes, st.integers(0, 9))
def test_pairs_of_groups(n, groups):
    values = ints(1, 255, n, groups)
    packed = pack_group_pairs(values)
    assert packed.is_contiguous() and packed.shape == (up(n, 32) // 16, up(groups, 2) // 2, 16, 2)
    assert torch.equal(unpack_group_pairs(packed, n, groups, 1), values.double())
    assert packed.count_nonzero() == values.numel()


@pytest.mark.parametrize("group", [8, 128, 240, 248, 256, 264, 512, 1000, 4096])
@pytest.mark.parametrize("columns", [1, 250, 1000])
def test_groups_are_split_where_sums_would_leave_int16(group, columns):
    values = torch.arange(2 * -(-columns // group)).view(2, -1)
    parts, width = split_groups(values, group, columns)
    assert width <= MAX_DUAL_GROUP and width % 8 == 0 and group % width == 0
    assert width == group or group > MAX_DUAL_GROUP
    assert parts.shape == (2, -(-columns // width))
    column = torch.arange(columns)
    assert torch.equal(parts[:, column // width], values[:, column // group])


def test_the_widest_group_is_the_last_whose_sum_is_an_int16():
    assert MAX_DUAL_GROUP * 128 < 2**15 <= (MAX_DUAL_GROUP + 8) * 128
