"""Formats as text, what follows from one, and the combinations that do not exist."""

from __future__ import annotations

import pytest
import torch
from numerics_formats import FORMATS

from qcompile.numerics.format import Format

OTHERS = ["int4/group32/smooth", "int4/group16/floatzero/f16", "int8/tensor/bf16", "int4/group32/k6"]


@pytest.mark.parametrize("text", [*FORMATS, *OTHERS])
def test_text_round_trip(text):
    assert str(Format.parse(text)) == text
    assert Format.parse(str(Format.parse(text))) == Format.parse(text)


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
        "int8/group16/dual",
        "int4/group16/floatzero/dual",
        "int4/group16/dual/smooth",
        "fp4/group16/dual",
        "int4/group64/k6",
        "int4/k6",
        "int3/group32/k6",
        "int4/group32/k6/dual",
        "int4/group32/k6/zero",
        "int4/group32/k6/bf16",
        "int4/group32/k6/smooth",
    ],
)
def test_impossible_formats_are_refused(text):
    with pytest.raises(ValueError):
        Format.parse(text)


@pytest.mark.parametrize(
    "parts, words",
    [
        (("int8", "column"), "granularity 'column' is unknown"),
        (("int4", "group", 0), "granularity 'group' and group size 0"),
        (("int4", "row", 16), "granularity 'row' and group size 16"),
        (("fp4", "group", 16, "none", False, "m3"), "powers='m3'"),
    ],
)
def test_parts_that_no_text_says_are_refused(parts, words):
    with pytest.raises(ValueError, match=words):
        Format(*parts)


@pytest.mark.parametrize(
    "text, dtype, codes, largest, is_float, two_level, rows",
    [
        ("int8/row", torch.int8, (-128, 127), 127.0, False, False, True),
        ("int8/tensor", torch.int8, (-128, 127), 127.0, False, False, True),
        ("int8/row/zero", torch.uint8, (0, 255), 255.0, False, False, False),
        ("int8/group16", torch.int8, (-128, 127), 127.0, False, False, False),
        ("int4/row", torch.int8, (-8, 7), 7.0, False, False, False),
        ("int4/group16/floatzero", torch.uint8, (0, 15), 15.0, False, False, False),
        ("int4/group16/dual", torch.int8, (-8, 7), 7.0, False, True, False),
        ("int3/group16/zero", torch.uint8, (0, 7), 7.0, False, False, False),
        ("int4/group32/k6", torch.uint8, (0, 15), 15.0, False, True, False),
        ("fp4/row", torch.uint8, (0, 15), 6.0, True, False, False),
        ("fp4/group16/m1", torch.uint8, (0, 15), 6.0, True, True, False),
        ("fp8/row", torch.float8_e4m3fn, None, 448.0, True, False, False),
    ],
)
def test_what_follows_from_a_format(text, dtype, codes, largest, is_float, two_level, rows):
    form = Format.parse(text)
    assert (form.code_dtype, form.max_value) == (dtype, largest)
    assert (form.is_float, form.two_level, form.is_int8_rows) == (is_float, two_level, rows)
    assert codes in (None, (form.qmin, form.qmax))


def test_a_group_beyond_the_row_is_one_group_of_the_row():
    form = Format("int4", "group", 10**400)
    assert (form.groups(64), form.width(64), form.groups(0), form.width(0)) == (1, 64, 0, 1)
    form = Format("int4", "group", 48)
    assert (form.groups(100), form.width(100), form.groups(48), form.width(48)) == (3, 48, 1, 48)


@pytest.mark.parametrize(
    "text, dtype",
    [("int4/group32/f16", torch.float16), ("fp8/row/bf16", torch.bfloat16), ("int8/row", torch.float32)],
)
def test_a_format_says_the_dtype_of_its_stored_scales(text, dtype):
    form = Format.parse(text)
    assert str(form) == text and form.scale_dtype == dtype
    assert str(Format.parse("int8/row/f32")) == "int8/row"  # the default is not written


@pytest.mark.parametrize("text", ["int4/group16/dual/bf16", "fp4/group16/m2/f16", "int4/group16/smooth/f16"])
def test_two_levels_of_scales_are_float32(text):
    with pytest.raises(ValueError, match="their scales are float32"):
        Format.parse(text)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale 'f8' is unknown"):
        Format("int8", scale="f8")


def test_k6_says_its_other_parts():
    form = Format.parse("int4/group32/k6")
    assert form == Format("int4", "group", 32, zero="float", scale="f16", k6=True)
    assert Format.parse("int4/group32/floatzero/k6/f16") == form
    assert (form.scale_dtype, form.zero_dtype) == (torch.float16, torch.uint8)
    with pytest.raises(ValueError, match="six-bit scales are for int4 in groups of 32"):
        Format("int4", "group", 32, k6=True)


@pytest.mark.parametrize(
    "text, columns, count, fits",
    [
        ("int4/group32/k6", 512, 4, True),
        ("int4/group32/k6", 576, 4, False),
        ("int4/group32", 576, 18, True),
        ("int4/group128", 576, 5, True),
        ("int4/group32/dual", 576, 1, True),
        ("fp4/group32/m1", 576, 1, True),
        ("int8/row", 576, 1, True),
    ],
)
def test_how_many_scales_a_row_stores(text, columns, count, fits):
    form = Format.parse(text)
    assert (form.stored_scales(columns), form.fits(columns)) == (count, fits)


@pytest.mark.parametrize("text, dtype", [("int4/group32/zero", torch.uint8), ("int4/group32/floatzero", torch.float32)])
def test_a_format_says_the_dtype_of_its_stored_zero_points(text, dtype):
    assert Format.parse(text).zero_dtype == dtype
