"""Clips, codes and gradients of weights and activations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.fixed_point_operand import (
    batch_range,
    clip_gradient,
    inside_clip,
    moved_range,
    operand_codes,
    step_of,
)

SEEDS = st.integers(0, 99)


def draw(seed, count=20_000):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.floats(0.1, 10))
def test_sigma_is_three_standard_deviations(seed, scale):
    x = draw(seed) * scale
    assert float(batch_range(x, "sigma", True)) == pytest.approx(3 * scale, rel=0.03)
    assert float(batch_range(x.abs(), "sigma", False)) == pytest.approx(3 * scale, rel=0.03)
    assert float(batch_range(x, "max", True)) == float(x.abs().max())


def test_what_is_far_from_zero_is_not_clipped():
    assert float(batch_range(torch.full((8,), -5.0), "sigma", True)) == pytest.approx(5)
    assert float(batch_range(torch.zeros(8), "sigma", True)) == 0
    assert float(step_of(torch.zeros(()), 7)) == 1
    assert float(batch_range(torch.zeros(0, 4), "sigma", True)) == 1


@given(SEEDS, st.integers(2, 8), st.booleans())
def test_codes_and_errors(seed, bits, signed):
    x = draw(seed, 500) if signed else draw(seed, 500).abs()
    levels = 2 ** (bits - 1) - 1
    clip = batch_range(x, "sigma", signed)
    step = step_of(clip, levels)
    codes, same = operand_codes(x, step, -levels if signed else 0, levels)
    inside = inside_clip(x, clip, signed)
    assert torch.equal(same, step) and codes.dtype == torch.int8
    assert int(codes.max()) <= levels and int(codes.min()) >= (-levels if signed else 0)
    assert float((codes * step - x).abs()[inside].max()) <= float(step) / 2 * (1 + 1e-5)
    assert torch.equal(codes[~inside].float(), x[~inside].sign() * levels)


@pytest.mark.parametrize("signed", [True, False])
def test_nan_shows_in_the_step(signed):
    x = torch.tensor([1.0, math.nan, 0.5])
    assert math.isnan(batch_range(x, "sigma", signed)) and math.isnan(batch_range(x, "max", signed))
    codes, step = operand_codes(x, torch.tensor(0.5), -7, 7)
    assert codes.tolist() == [2, 0, 1] and math.isnan(step)


@given(SEEDS, st.booleans())
def test_learned_clip_has_the_gradient_of_its_formula(seed, signed):
    """Autograd of clip / L (clamp(x L / clip) + a constant that rounds) gives the same."""
    x = draw(seed, 300).double()
    clip = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    levels = 7
    low = -levels if signed else 0
    scaled = (x * levels / clip).clamp(low, levels)
    rounded = scaled + (scaled.detach().round() - scaled.detach())
    gradient = draw(seed + 1, 300).double()
    (expected,) = torch.autograd.grad(rounded * clip / levels, clip, gradient)
    codes = scaled.detach().round().to(torch.int8)
    got = clip_gradient(gradient, x, codes, clip.detach(), levels, signed)
    assert float(got) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


def test_running_range():
    start = moved_range(torch.tensor(0.0), torch.tensor(2.0))
    assert float(start) == 2
    assert float(moved_range(start, torch.tensor(3.0))) == pytest.approx(2.1)
    for bad in (math.nan, math.inf):
        assert float(moved_range(start, torch.tensor(bad))) == 2
        assert float(moved_range(torch.tensor(0.0), torch.tensor(bad))) == 0
