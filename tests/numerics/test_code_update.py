"""Changes of a quantized weight: small ones survive stochastic rounding, none at all leaves the bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.code_update import add_to_codes, takes_updates
from qcompile.numerics.counter_random import derived_stream, uniform
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor

FORMATS = ["int8/group256/zero", "int8/group16/zero", "int8/row", "int8/group16/floatzero"]
ZERO = Format.parse("int8/group256/zero")


def noise(shape, step=0):
    return uniform(shape, derived_stream(3, torch.tensor(step)), device=torch.device("cpu"))


def same(a, b):
    return all(x is y or torch.equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))


@pytest.mark.parametrize("text", FORMATS)
@given(columns=st.integers(1, 300), seed=st.integers(0, 99), stochastic=st.booleans())
def test_no_change_leaves_every_bit(text, columns, seed, stochastic):
    torch.manual_seed(seed)
    weight = quantize_tensor(torch.randn(3, columns), Format.parse(text))
    u = noise((3, columns)) if stochastic else None
    changed = add_to_codes(
        weight, torch.randn(3, columns) * 0.01, 0.0, noise((3, columns), 1)
    )  # not of the range's ends
    for start in (weight, changed):
        assert same(add_to_codes(start, torch.zeros(3, columns), 0.0, u), start)


def test_one_changed_group_leaves_the_others():
    weight = quantize_tensor(torch.randn(2, 40), Format.parse("int8/group16/zero"))
    change = torch.zeros(2, 40)
    change[1, 17] = 5.0
    new = add_to_codes(weight, change, 0.0, noise((2, 40)))
    kept = torch.ones(2, 40, dtype=torch.bool)
    kept[1, 16:32] = False
    assert torch.equal(new.codes[kept], weight.codes[kept]) and not torch.equal(new.codes, weight.codes)
    assert torch.equal(new.scale[0], weight.scale[0]) and new.scale[1, 1] > weight.scale[1, 1]
    assert abs(float(new.dequantize()[1, 17] - weight.dequantize()[1, 17]) - 5.0) < float(new.scale[1, 1])


def grid():
    """Codes 0 and 255 at the ends of each row, which no update moves, so that the scale stays."""
    values = torch.full((64, 256), 20.0)
    values[:, 0], values[:, 1] = -55.0, 200.0
    weight = quantize_tensor(values, ZERO)
    assert torch.equal(weight.scale, torch.ones(64, 1)) and torch.equal(weight.dequantize(), values)
    change = torch.zeros(64, 256)
    change[:, 2:] = 0.1
    return weight, change


def test_a_hundred_tenths_of_a_scale_are_ten():
    weight, change = grid()
    start = weight.dequantize()
    for step in range(100):
        weight = add_to_codes(weight, change, 0.0, noise((64, 256), step))
    moved = (weight.dequantize() - start)[:, 2:]
    spread = (100 * 0.1 * 0.9) ** 0.5  # of one value: a hundred Bernoulli draws
    assert abs(float(moved.mean()) - 10) < 4 * spread / moved.numel() ** 0.5
    assert float(moved.std()) == pytest.approx(spread, rel=0.1)


def test_to_nearest_they_are_none():
    weight, change = grid()
    start = weight.dequantize()
    for _ in range(100):
        weight = add_to_codes(weight, change)
    assert torch.equal(weight.dequantize(), start)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("text", FORMATS)
def test_a_group_of_one_sign_keeps_its_range(text, sign):
    """A zero point is a code, so a range must include zero; without it the values would be clamped."""
    weight = quantize_tensor(sign * (5 + torch.rand(4, 256)), Format.parse(text))
    change = torch.full((4, 256), sign * 0.5)
    new = add_to_codes(weight, change, 0.0, noise((4, 256)))
    error = (new.dequantize() - weight.dequantize() - change).abs()
    assert float(error.max()) <= float(new.scale.max()) * 1.01


@pytest.mark.parametrize("text", FORMATS)
@given(seed=st.integers(0, 999), decay=st.sampled_from([0.0, 0.1]))
def test_the_error_is_below_a_scale(text, seed, decay):
    torch.manual_seed(seed)
    weight = quantize_tensor(torch.randn(3, 40), Format.parse(text))
    change = torch.randn(3, 40)
    exact = weight.dequantize() * (1 - decay) + change
    rounded = add_to_codes(weight, change, decay, noise((3, 40)))
    # A range's end may lie half a scale beyond the codes, where the zero point was rounded.
    assert bool(((rounded.dequantize() - exact).abs() <= expand_groups(rounded.scale, rounded.format, 40) * 1.01).all())
    nearest = add_to_codes(weight, change, decay)
    assert same(nearest, quantize_tensor(exact, Format.parse(text)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused(bad):
    weight = quantize_tensor(torch.randn(2, 8), ZERO)
    with pytest.raises(ValueError, match="NaN or Inf"):
        add_to_codes(weight, torch.full((2, 8), bad))


def test_which_formats_take_updates():
    assert all(takes_updates(Format.parse(text)) for text in FORMATS)
    others = ("fp8/row", "int4/group32/zero/dual", "int8/group32/smooth", "int8/tensor")
    assert not any(takes_updates(Format.parse(text)) for text in others)
