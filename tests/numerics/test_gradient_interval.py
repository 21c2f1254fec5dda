"""Rounded gradients: codes in range, errors within a step, unbiased; gamma moves as the paper says and settles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.gradient_interval import (
    MIN_GAMMA,
    least_error_gamma,
    moved_gamma,
    quantile_gamma,
    quantize_gradient,
)

BITS = st.integers(2, 8)
GAMMAS = st.floats(0.01, 1)
INTERVALS = ["paper", "quantile", "max", "least_error"]


def draw(seed, count=4000):
    """Gradients with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) ** 3


def quantized(gradient, gamma=0.0, step=0, **changes):
    format = FixedPointFormat(**changes)
    return quantize_gradient(gradient, torch.tensor(gamma), torch.tensor(step), format, format.stream)


@given(BITS, GAMMAS, st.sampled_from(["stochastic", "nearest"]), st.integers(0, 99))
def test_codes_and_errors(bits, gamma, rounding, seed):
    gradient, levels = draw(seed), 2 ** (bits - 1) - 1
    codes, step, _ = quantized(gradient, gamma, gradient_bits=bits, rounding=rounding)
    top = gradient.abs().max()
    assert int(codes.abs().max()) <= levels
    assert float(step) == pytest.approx(gamma * float(top) / levels, rel=1e-6)
    inside = gradient.abs() <= gamma * top
    error = (codes.double() * step - gradient).abs()[inside]
    allowed = float(step) * (0.5 if rounding == "nearest" else 1)
    assert float(error.max()) <= allowed * (1 + 1e-5)
    assert torch.equal(codes[~inside], (gradient.sign() * levels).to(torch.int8)[~inside])


@given(GAMMAS, st.floats(-1, 1))
def test_stochastic_rounding_is_unbiased_up_to_the_clip(gamma, value):
    count = 100_000
    gradient = torch.full((count,), value)
    gradient[0] = 1.0  # the largest
    codes, step, _ = quantized(gradient, gamma)
    mean, clipped = float((codes[1:].double() * step).mean()), max(-gamma, min(gamma, value))
    assert abs(mean - clipped) <= 3 * float(step) * 0.5 / count**0.5 + 1e-6


@given(GAMMAS, st.floats(0, 1))
def test_gamma_moves_by_beta_and_stays_in_range(gamma, ratio):
    format = FixedPointFormat()
    moved = float(moved_gamma(torch.tensor(gamma), torch.tensor(ratio), format))
    target = gamma + format.beta * (1 if ratio > format.share else -1 if ratio < format.share else 0)
    assert moved == pytest.approx(min(1, max(MIN_GAMMA, target)), abs=1e-6)


@settings(max_examples=6)
@given(st.integers(0, 50), st.sampled_from([0.3, 0.1, 0.01]))
def test_gamma_settles_at_the_quantile(seed, alpha):
    """On one gradient again and again, from either side, with a small step: the share beyond is the paper's, to 1/N."""
    gradient = draw(seed)
    format = FixedPointFormat(alpha=alpha, beta=2e-4)
    top, settled = gradient.abs().max(), quantile_gamma(gradient, gradient.abs().max(), format.share)
    for start in (float(settled) * 0.97, min(1.0, float(settled) * 1.03)):
        gamma = torch.tensor(start)
        for step in range(400):
            gamma = quantize_gradient(gradient, gamma, torch.tensor(step), format, 0)[2]
        near = [(gradient.abs() > (gamma + shift) * top).float().mean() for shift in (-2e-4, 0, 2e-4)]
        assert float(near[-1]) - 1 / 4000 <= format.share <= float(near[0]) + 1 / 4000


def test_the_start_is_the_quantile():
    gradient = draw(1, 15_000)
    _, step, following = quantized(gradient, 0.0, alpha=0.1)
    start = quantile_gamma(gradient, gradient.abs().max(), 0.1 / 15)
    assert float(step) == pytest.approx(float(start * gradient.abs().max() / 7), rel=1e-6)
    assert abs(float(following) - float(start)) == pytest.approx(1e-3, abs=1e-6)
    beyond = (gradient.abs() > start * gradient.abs().max()).sum()
    assert abs(int(beyond) - 100) <= 1


@pytest.mark.parametrize("interval", ["quantile", "max", "least_error"])
def test_intervals_without_state(interval):
    gradient = draw(3)
    first, again = (quantized(gradient, gamma, interval=interval) for gamma in (0.0, 0.5))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_least_error_is_the_least():
    gradient, levels = draw(4), 7
    top = gradient.abs().max()

    def error(gamma):
        step = gamma * top / levels
        return float(((gradient / step).round().clamp(-levels, levels) * step - gradient).square().sum())

    best = float(least_error_gamma(gradient, top, levels))
    assert best < 1
    assert error(best) == pytest.approx(min(error(k / 20) for k in range(1, 21)), rel=1e-6)


@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_what_is_not_finite_leaves_gamma_and_shows(bad, interval, gamma):
    gradient = draw(5)
    gradient[7] = bad
    codes, step, following = quantized(gradient, gamma, interval=interval)
    assert float(following) == gamma
    assert not bool(torch.isfinite(codes.float() * step).all())
    assert not bool(torch.isfinite((codes.double() * step).sum()))


@pytest.mark.parametrize("interval", INTERVALS)
def test_zeros_give_zeros_and_leave_gamma(interval):
    codes, step, following = quantized(torch.zeros(4, 5), 0.25, interval=interval)
    assert not codes.any() and bool(torch.isfinite(step)) and float(following) == 0.25
    assert quantized(torch.zeros(0, 3), 0.25)[0].shape == (0, 3)


@given(st.integers(-40, 40), st.sampled_from(INTERVALS), st.sampled_from([0.0, 0.3]))
def test_scaling_the_loss_by_a_power_of_two_changes_no_code(power, interval, gamma):
    gradient = draw(6)
    one, other = (quantized(g, gamma, interval=interval) for g in (gradient, gradient * 2.0**power))
    assert torch.equal(one[0], other[0]) and torch.equal(one[2], other[2])
    assert torch.equal(one[1] * 2.0**power, other[1])


def test_draws_differ_by_step_and_stream_and_block_borders_do_not_matter():
    gradient = draw(7, 200_000)  # of several blocks
    format = FixedPointFormat()
    a, b, c = (
        quantize_gradient(gradient, torch.tensor(0.3), torch.tensor(step), format, stream)[0]
        for step, stream in ((0, 1), (1, 1), (0, 2))
    )
    assert not torch.equal(a, b) and not torch.equal(a, c)
    half = torch.full((200_000,), 0.5 / 7)  # half a step of the largest: every code is a coin
    half[0] = 1.0
    coins = quantize_gradient(half, torch.tensor(1.0), torch.tensor(0), format, 1)[0][1:].double()
    assert abs(float(torch.corrcoef(torch.stack([coins[:65536], coins[65536:131072]]))[0, 1])) < 0.02
    same = quantize_gradient(gradient.view(400, 500), torch.tensor(0.3), torch.tensor(0), format, 1)[0]
    assert torch.equal(same.view(-1), a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    codes, step, following = quantized(draw(8).to(dtype), 0.5)
    assert codes.dtype == torch.int8 and step.dtype == following.dtype == torch.float32
    assert dataclasses.asdict(FixedPointFormat())["alpha"] == 0.01
