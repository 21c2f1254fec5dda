"""Fixed-point formats: text and back, levels, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.fixed_point_format import FixedPointFormat

BITS = st.integers(2, 8)


@given(
    st.builds(
        FixedPointFormat,
        BITS,
        BITS,
        BITS,
        st.booleans(),
        st.sampled_from(["sigma", "learned", "max"]),
        st.sampled_from(["paper", "quantile", "max", "least_error"]),
        st.sampled_from(["stochastic", "nearest"]),
        st.floats(1e-9, 0.499),
        st.floats(1e-9, 0.99),
        st.integers(-(2**40), 2**40),
        st.sampled_from(["", "blocks.0.weight", "a/b.weight", "site=.weight"]),
    )  # fmt: skip
)
def test_text_and_back(format):
    assert FixedPointFormat.parse(str(format)) == format


def test_levels():
    four = FixedPointFormat()
    assert (four.weight_levels, four.act_levels, four.lowest_act, four.gradient_levels) == (7, 7, -7, 7)
    unsigned = FixedPointFormat(signed=False)
    assert (unsigned.act_levels, unsigned.lowest_act) == (15, 0)
    assert FixedPointFormat(act_bits=8, signed=False).act_levels == 127
    assert FixedPointFormat(gradient_bits=2).gradient_levels == 1
    assert four.share == pytest.approx(0.01 / 15)


@pytest.mark.parametrize(
    "field,value",
    [
        ("weight_bits", 1), ("act_bits", 9), ("gradient_bits", True), ("gradient_bits", 4.0), ("alpha", 0.0),
        ("alpha", 0.5), ("alpha", float("nan")), ("beta", 0.0), ("beta", float("inf")), ("interval", "min"),
        ("ranges", "none"), ("rounding", "down"), ("stream", 1.5),
    ],
)  # fmt: skip
def test_refused_with_the_value_and_the_fix(field, value):
    with pytest.raises(ValueError, match="Fix") as error:
        FixedPointFormat(**{field: value})
    assert field.split("_")[0] in str(error.value) and repr(value) in str(error.value)


@pytest.mark.parametrize("text", ["", "int4", "w4/a4/g4/half/sigma/paper/stochastic/alpha=0.1/beta=0.1/stream=0"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="no fixed-point format"):
        FixedPointFormat.parse(text)
