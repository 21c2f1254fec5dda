"""Packed bytes of weights: they unpack to the same codes, and formats without a layout are named."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, layout_of, pack_weight, unpack_weight
from qcompile.numerics.format import Format


@pytest.mark.parametrize("bits,k", [(2, 128), (3, 200), (4, 64), (4, 300), (8, 65)])
def test_packing(bits, k):
    form = Format(f"int{bits}", "group", 64, "int")
    layout = layout_of(form)
    codes = torch.randint(0, 2**bits, (7, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_weight(codes, layout)
    assert packed.shape == (7, -(-k // layout.block) * layout.block * bits // 8)
    assert torch.equal(unpack_weight(packed, layout, k), codes)


def test_a_byte_has_the_same_column_of_every_chunk():
    codes = torch.arange(128, dtype=torch.uint8)[None] % 16
    packed = pack_weight(codes, WeightLayout(4, 64, 128))
    assert packed[0, 5] == codes[0, 5] | codes[0, 64 + 5] << 4


def test_six_bit_scales_have_no_kernel():
    assert layout_of(Format.parse("int4/group32/floatzero")) is not None
    assert layout_of(Format.parse("int4/group32/k6")) is None


def test_formats_have_the_largest_chunk_that_their_groups_allow():
    chunks = {"int4/group128": 64, "int4/group32": 32, "int3/group64": 16, "int2/group64": 32, "int8/row": 64}
    assert {text: layout_of(Format.parse(text)).chunk for text in chunks} == chunks
    for text in ("fp8/row", "int4/group8", "int4/group192", "int8/tensor"):
        assert layout_of(Format.parse(text)) is None
