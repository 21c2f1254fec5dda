"""Packed bytes of weights: they unpack to the same codes, and formats without a layout are named."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen.triton.kernels.weight_layout import (
    WeightLayout,
    join_scales,
    layout_of,
    pack_weight,
    split_scales,
    unpack_weight,
)
from qcompile.numerics.format import Format


@pytest.mark.parametrize("bits,k", [(2, 128), (3, 200), (4, 64), (4, 300), (8, 65)])
def test_packing(bits, k):
    form = Format(f"int{bits}", "group", 64, "int")
    layout = layout_of(form)
    codes = torch.randint(0, 2**bits, (7, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_weight(codes, layout)
    assert packed.dtype == layout.dtype and packed.shape == (7, layout.words(k))
    assert packed.nbytes == 7 * -(-k // layout.block) * layout.block * bits // 8
    assert torch.equal(unpack_weight(packed, layout, k), codes)


def test_a_byte_has_the_same_column_of_every_chunk():
    codes = torch.arange(128, dtype=torch.uint8)[None] % 16
    packed = pack_weight(codes, WeightLayout(4, 64, 128))
    assert packed[0, 5] == codes[0, 5] | codes[0, 64 + 5] << 4


def test_a_word_of_sixteen_bits_has_the_same_column_of_four_chunks():
    codes = torch.randint(0, 16, (1, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack_weight(codes, WeightLayout(4, 32, 128, 16))[0].int() & 0xFFFF
    c = codes[0].int()
    assert torch.equal(words, c[:32] | c[32:64] << 4 | c[64:96] << 8 | c[96:] << 12)


def test_one_lop3_makes_two_values_of_every_pair_of_words():
    """(words >> 4c) & 0x000f000f | magic, as the kernel's assembler does it, over every pair of nibbles."""
    low, high = np.meshgrid(np.arange(65536, dtype=np.uint32), np.array([0, 1, 0x8000, 0xFFFF, 0x1234], np.uint32))
    words = low | high << 16
    for c, (magic, base, dtype) in itertools.product(
        range(4), ((0x43004300, 128, torch.bfloat16), (0x64006400, 1024, torch.float16))
    ):
        two = (words >> np.uint32(4 * c)) & np.uint32(0x000F000F) | np.uint32(magic)
        for half, source in ((two & 0xFFFF, low), (two >> 16, high)):
            values = torch.from_numpy(half.astype(np.uint16).view(np.int16)).view(dtype).float().numpy()
            assert np.array_equal(values, base + (source >> 4 * c & 15).astype(np.float32))


SCALES = st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=6, max_size=6)


@given(SCALES, st.sampled_from([2, 3, 4]), st.booleans())
def test_scale_and_zero_point_in_one_word(scales, bits, with_zero):
    scale = torch.tensor(scales, dtype=torch.float32).view(2, 3)
    zero = torch.arange(6, dtype=torch.uint8).view(2, 3) * (2**bits - 1) // 5 if with_zero else None
    words = join_scales(scale, zero, bits)
    assert words.dtype == torch.int32 and words.shape == (2, 3)
    got, points = split_scales(words)
    assert torch.equal(got, scale.bfloat16().float())
    assert torch.equal(points, torch.full((2, 3), 2.0 ** (bits - 1)) if zero is None else zero.float())


def test_six_bit_scales_have_no_kernel():
    assert layout_of(Format.parse("int4/group32/floatzero")) is not None
    assert layout_of(Format.parse("int4/group32/k6")) is None


def test_formats_have_the_largest_chunk_that_their_groups_allow():
    chunks = {"int4/group128": 32, "int4/group16": 16, "int3/group64": 16, "int2/group64": 32, "int8/row": 64}
    assert {text: layout_of(Format.parse(text)).chunk for text in chunks} == chunks
    for text in ("fp8/row", "int4/group8", "int4/group192", "int8/tensor"):
        assert layout_of(Format.parse(text)) is None
