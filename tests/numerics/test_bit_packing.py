"""Packed codes: the layout, and losslessness."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.bit_packing import pack, packed_columns, unpack


def test_nibble_layout():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3).tolist() == [[0b11010001, 0b0]]
    assert pack(torch.tensor([[1, 255]], dtype=torch.int16), 8).dtype == torch.uint8


@given(st.integers(1, 40), st.sampled_from([2, 3, 4, 8]), st.integers(0, 999))
def test_unpack_is_the_inverse(k, bits, seed):
    codes = torch.randint(0, 2**bits, (3, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(unpack(pack(codes, bits), bits, k), codes)


@given(st.integers(1, 40), st.sampled_from([2, 3, 4, 8]))
def test_packed_columns_are_the_bytes_of_a_row(k, bits):
    assert pack(torch.zeros(2, k, dtype=torch.uint8), bits).shape == (2, packed_columns(k, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rows_of_other_lengths_are_refused(bits):
    packed = pack(torch.zeros(2, 40, dtype=torch.uint8), bits)
    for columns in (31, 49):
        with pytest.raises(ValueError, match=f"a row of {columns} codes of {bits} bits is"):
            unpack(packed, bits, columns)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        unpack(packed.new_zeros(()), bits, 1)
