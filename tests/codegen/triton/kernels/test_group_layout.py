"""Four codes of a word become four int8 at once, over the whole domain; words of scales and zero points read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ptx_words import assembler, evaluate
from test_w4a8_layout import int8_bytes, quadruples, words_of

from qcompile.codegen.triton.kernels.group_layout import group_layout_of, group_words, split_words
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.render import render
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import MIN_EXPONENT, decode_e2m1, power_of_two

FUNCTIONS = (("low_codes", 0), ("high_codes", 4))


@pytest.mark.parametrize("name,shift", FUNCTIONS)
def test_every_zero_point_and_code(name, shift):
    text, rng = assembler(render(GemmGroup(zero=True)), name), np.random.default_rng(0)
    for z in range(16):
        four = quadruples(np.arange(16), rng)
        got = int8_bytes(evaluate(text, r1=words_of(four, shift, rng), r2=(128 - z) * 0x01010101))
        assert np.array_equal(got, four - z)


@pytest.mark.parametrize("name,shift", FUNCTIONS)
def test_every_symmetric_code(name, shift):
    text, rng = assembler(render(GemmGroup()), name), np.random.default_rng(0)
    four = quadruples(np.arange(16), rng)
    got = int8_bytes(evaluate(text, r1=words_of(four, shift, rng)))
    assert np.array_equal(got, 16 * (four - 8)) and "0x6a" in text


@pytest.mark.parametrize("name,shift", FUNCTIONS)
def test_every_fp4_code(name, shift):
    """The fp8 byte is a 64th of the value, also of 0.5 and of both zeros."""
    text, rng = assembler(render(GemmFp4Fp8()), name), np.random.default_rng(0)
    four = quadruples(np.arange(16), rng)
    bytes_ = torch.from_numpy(int8_bytes(evaluate(text, r1=words_of(four, shift, rng)))).view(torch.float8_e4m3fn)
    want = decode_e2m1(torch.from_numpy(four).byte())
    assert torch.equal(bytes_.float() * 64, want) and torch.equal(
        torch.signbit(bytes_.float()), torch.from_numpy(four > 7)
    )


def test_powers_of_two_are_exact():
    form, act = Format.parse("fp4/group32/m2"), Format("fp8")
    exponent = torch.arange(MIN_EXPONENT, 1, dtype=torch.int8)[None]
    words = group_words(torch.tensor([[1.7]]), None, exponent, form, group_layout_of(form, act), 9 * 32)
    scale = split_words(words, form)[0]
    assert torch.equal(scale[:9].t(), torch.tensor([[1.7]]) * power_of_two(exponent))
    assert torch.equal(words, scale * 64)


@given(st.integers(0, 15), st.floats(2.0**-100, 2.0**100, width=32), st.booleans())
def test_words_read_back(z, s, with_zero):
    form, act = Format.parse("int4/group128/zero" if with_zero else "int4/group128"), Format("int8")
    layout, zero = group_layout_of(form, act), torch.tensor([[z]]).byte() if with_zero else None
    scale, point = split_words(group_words(torch.tensor([[s]]), zero, None, form, layout, 128), form)
    assert (float(scale), int(point)) == (s, z if with_zero else 8)


def test_a_negative_scale_leaves_the_zero_point_alone():
    """A clip search gives some groups negative scales, whose sign bit is the highest of the lower word."""
    form, act = Format.parse("int4/group128/zero"), Format("int8")
    words = group_words(torch.tensor([[-3.5]]), torch.tensor([[7]]).byte(), None, form, group_layout_of(form, act), 128)
    assert [float(part) for part in split_words(words, form)] == [-3.5, 7]


def test_groups_of_the_weight_are_repeated_for_those_of_x():
    scale = torch.arange(1.0, 5.0).reshape(2, 2)
    for form, k, want in (
        ("int4/group128", 256, [[1, 3], [1, 3], [2, 4], [2, 4]]),
        ("int4/group128", 150, [[1, 3], [1, 3], [2, 4], [2, 4]]),
        ("int4/row", 100, [[1, 3], [1, 3]]),
    ):
        form, act = Format.parse(form), Format.parse("int4/group64")
        own = scale if form.group else scale[:, :1]
        words = group_words(own, None, None, form, group_layout_of(form, act), k)
        assert (words * 16).tolist() == want


def test_formats_and_their_chunks():
    takes = {
        ("int4/group128/zero", "int4/row"): (128, 64), ("int4/group64", "int8/row"): (64, 64),
        ("int4/group32/zero", "int8/tensor"): (32, 32), ("int4/group192", "int4/row"): (192, 32),
        ("int4/group256", "int4/group64/smooth"): (64, 64), ("int4/row", "int4/group128/zero"): (128, 64),
        ("fp4/group128/m2", "fp8/row"): (128, 64), ("fp4/row", "fp8/row"): (128, 64),
        ("fp4/group32", "fp8/tensor"): (32, 32), ("fp4/row", "fp8/group64"): (64, 64),
    }  # fmt: skip
    for (form, act), (group, chunk) in takes.items():
        layout = group_layout_of(Format.parse(form), Format.parse(act))
        assert (layout.group, layout.chunk, layout.word) == (group, chunk, 8)
    for form, act in (
        ("int4/group16", "int8/row"), ("int4/group96", "int8/row"), ("int4/row", "int8/row"),
        ("int4/group128/zero/dual", "int8/row"), ("int4/group128/floatzero", "int8/row"),
        ("int4/tensor", "int4/group64"),
        ("int4/group64", "int4/group128"), ("int4/group128", "int8/row/zero"), ("int4/group128", "fp8/row"),
        ("int8/group128", "int8/row"), ("int3/group128", "int8/row"), ("int4/group128", "int4/row/floatzero"),
        ("int4/group32/k6", "int8/row"), ("fp4/group128/m2", "int8/row"), ("fp4/tensor", "fp8/row"),
    ):  # fmt: skip
        assert group_layout_of(Format.parse(form), Format.parse(act)) is None, (form, act)
