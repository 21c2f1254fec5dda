"""Four codes of a word become four int8 at once: the assembler's formula over the whole domain, and what is packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptx_words import assembler, evaluate

from qcompile.codegen.triton.kernels.render import render
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of, int8_values, step_words
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.numerics.format import Format

PER_GROUP, PER_CHANNEL = render(GemmW4A8()), render(GemmW4A8(group=0))
FUNCTIONS = (("low_codes", 0), ("high_codes", 4))


def quadruples(values, rng):
    """Words of four values: every pair of neighbors in every place, the other two random."""
    a, b = (side.ravel() for side in np.meshgrid(values, values))
    c, d = rng.choice(values, a.size), rng.choice(values, a.size)
    return np.stack([np.concatenate(part) for part in zip((a, b, c, d), (c, a, b, d), (c, d, a, b), strict=True)])


def words_of(four, shift, rng):
    """Bytes with the codes at a shift, and random codes in the other half."""
    others = rng.integers(0, 16, four.shape)
    return sum((four[i] << shift | others[i] << (4 - shift)) << 8 * i for i in range(4))


def int8_bytes(word):
    return np.stack([(word >> np.uint64(8 * i) & np.uint64(255)).astype(np.uint8).view(np.int8) for i in range(4)])


@pytest.mark.parametrize("name,shift", FUNCTIONS)
def test_every_scale_zero_point_code_and_neighbor(name, shift):
    """s1 of all formats (1 .. 127, and -15 .. -1 of symmetric ones), every z, every q within reach."""
    text, rng, cases = assembler(PER_GROUP, name), np.random.default_rng(0), 0
    for s in (*range(-15, 0), *range(1, 128)):
        for z in range(16):
            reach = 127 // abs(s)
            four = quadruples(np.arange(max(0, z - reach), min(15, z + reach) + 1), rng)
            c = (128 - z * s) * 0x01010101 % 2**32
            got = int8_bytes(evaluate(text, r1=words_of(four, shift, rng), r2=s % 2**32, r6=c))
            assert np.array_equal(got, s * (four - z)), (s, z)
            cases += four.size
    assert cases > 1_200_000


@pytest.mark.parametrize("name,shift", FUNCTIONS)
def test_every_zero_point_and_code_of_a_channel(name, shift):
    text, rng = assembler(PER_CHANNEL, name), np.random.default_rng(0)
    for z in range(16):
        four = quadruples(np.arange(16), rng)
        got = int8_bytes(evaluate(text, r1=words_of(four, shift, rng), r2=(128 - z) * 0x01010101))
        assert np.array_equal(got, four - z)


def test_what_pads_a_row_disturbs_no_column_before_it():
    """Codes of zero behind the last column may be beyond reach: what they carry goes to columns behind them."""
    text, rng = assembler(PER_GROUP, "low_codes"), np.random.default_rng(0)
    for used in (1, 2, 3):
        four = rng.integers(14, 16, (4, 1000))  # s = 127, z = 15: reach is one code
        four[used:] = 0
        got = int8_bytes(evaluate(text, r1=words_of(four, 0, rng), r2=127, r6=(128 - 15 * 127) * 0x01010101 % 2**32))
        assert np.array_equal(got[:used], 127 * (four[:used] - 15))


@given(st.integers(-15, 127).filter(bool), st.integers(0, 15))
def test_a_word_has_the_whole_product(s, z):
    words = step_words(torch.tensor([[z]]).byte(), torch.tensor([[s]]).to(torch.int8), 1, 1, torch.device("cpu"))
    assert int(words << 24 >> 24) == s and int(words >> 8) == s * z


def test_words_of_padding_and_of_channels():
    scale, cpu = torch.tensor([[3, -2], [1, 5]], dtype=torch.int8), torch.device("cpu")
    words = step_words(None, scale, 2, 3, cpu)
    assert words.shape == (3, 2) and words.dtype == torch.int32 and not words[2].any()
    assert (words >> 8).tolist() == [[24, 8], [-16, 40], [0, 0]]
    assert step_words(None, None, 3, 1, cpu).tolist() == [[8, 8, 8]]
    assert step_words(torch.tensor([[7], [9]]).byte(), None, 2, 1, cpu).tolist() == [[7, 9]]


def test_integers_of_codes():
    layout = byte_layout_of(Format.parse("int4/group32/zero/dual"))
    codes = torch.randint(0, 16, (2, 40)).byte()
    scale, zero = torch.tensor([[3, 2], [1, 5]], dtype=torch.int8), torch.tensor([[4, 0], [15, 9]]).byte()
    want = codes.int() - zero.int().repeat_interleave(32, 1)[:, :40]
    want *= scale.int().repeat_interleave(32, 1)[:, :40]
    assert torch.equal(int8_values(codes, step_words(zero, scale, 2, 2, codes.device), layout), want)


def test_formats_and_their_chunks():
    chunks = {"int4/group128/zero/dual": 64, "int4/group256/dual": 64, "int4/group64/dual": 64,
              "int4/group32/zero/dual": 32, "int4/row/zero": 64, "int4/row": 64}  # fmt: skip
    assert {text: byte_layout_of(Format.parse(text)).chunk for text in chunks} == chunks
    for text in ("int4/group16/zero/dual", "int4/group96/dual", "int4/group192/dual", "int4/group128/zero",
                 "int4/row/floatzero", "int4/tensor", "int8/row", "fp4/row", "int3/row"):  # fmt: skip
        assert byte_layout_of(Format.parse(text)) is None, text
