"""Formats as text, and the combinations that do not exist."""

from __future__ import annotations

import pytest
from numerics_formats import FORMATS

from qcompile.numerics.format import Format


@pytest.mark.parametrize("text", FORMATS)
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
    ],
)
def test_impossible_formats_are_refused(text):
    with pytest.raises(ValueError):
        Format.parse(text)


def test_a_group_beyond_the_row_is_one_group_of_the_row():
    form = Format("int4", "group", 10**400)
    assert (form.groups(64), form.width(64), form.groups(0), form.width(0)) == (1, 64, 0, 1)
    form = Format("int4", "group", 48)
    assert (form.groups(100), form.width(100), form.groups(48), form.width(48)) == (3, 48, 1, 48)
