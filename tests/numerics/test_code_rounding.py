"""The definitions of rounding to codes, and that a target's kernels are used where they apply, and only there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import code_rounding
from qcompile.numerics.code_rounding import gradient_codes, install_rounding_kernels, value_codes


@pytest.fixture
def definitions(monkeypatch):
    monkeypatch.setattr(code_rounding, "_installed", {})


@given(st.integers(1, 300), st.floats(1e-3, 1.0), st.sampled_from([1, 3, 7, 127]))
def test_codes_are_next_to_the_value_and_the_count_is_exact(n, share, levels):
    g = torch.randn(n, dtype=torch.float64)
    limit = share * g.abs().max()
    step = limit / levels
    clipped = g.clamp(-limit, limit)
    for draw, most in ((None, 0.5), (torch.tensor(7, dtype=torch.int32), 1.0)):
        codes, beyond = gradient_codes(g, step, limit, levels, draw)
        assert codes.dtype == torch.int8 and codes.abs().max() <= levels
        assert ((codes.double() * step - clipped).abs() <= most * step * (1 + 1e-9)).all()
        assert int(beyond) == int((g.abs() > limit).sum())


def test_draws_have_the_mean_of_the_value_and_do_not_depend_on_the_block(monkeypatch, definitions):
    g = torch.full((100_000,), 0.3)
    one, seven = torch.tensor(1.0), torch.tensor(7, dtype=torch.int32)
    codes, _ = gradient_codes(g, one, 7 * one, 7, seven)
    assert abs(float(codes.float().mean()) - 0.3) < 3 * (0.21 / 100_000) ** 0.5
    monkeypatch.setattr(code_rounding, "_BLOCK", 1000)
    assert torch.equal(gradient_codes(g, one, 7 * one, 7, seven)[0], codes)


def test_values_outside_the_clip_and_nan_are_told(definitions):
    x = torch.tensor([-3.0, -1.0, 0.0, 0.4, 2.0, 3.0])
    step, clip = torch.tensor(0.5), torch.tensor(2.0)
    codes, inside, lost = value_codes(x, step, clip, -4, 4, True)
    assert codes.tolist() == [-4, -2, 0, 1, 4, 4] and inside.tolist() == [False, True, True, True, True, False]
    codes, inside, lost = value_codes(x, step, clip, 0, 4, False)
    assert codes.tolist() == [0, 0, 0, 1, 4, 4] and inside.tolist() == [False, False, True, True, True, False]
    assert not lost
    codes, _, lost = value_codes(torch.tensor([1.0, float("nan")]), step, clip, -4, 4, True)
    assert lost and codes.tolist() == [2, 0]


def test_kernels_are_used_for_dense_float32_of_their_device_only(definitions):
    calls = []

    class Kernels:
        def gradient_codes(self, gradient, *rest):
            calls.append("gradient")
            return gradient.to(torch.int8), torch.zeros((), dtype=torch.int64)

        def value_codes(self, x, *rest):
            calls.append("value")
            return x.to(torch.int8), x > 0, torch.tensor(False)

    one = torch.tensor(1.0)
    install_rounding_kernels("cpu", Kernels())
    gradient_codes(torch.randn(4), one, one, 7, None)
    value_codes(torch.randn(4, 4), one, one, -7, 7, True)
    assert calls == ["gradient", "value"]
    value_codes(torch.randn(4, 4).t(), one, one, -7, 7, True)
    gradient_codes(torch.randn(4).double(), one, one, 7, None)
    install_rounding_kernels("cpu", None)
    gradient_codes(torch.randn(4), one, one, 7, None)
    assert calls == ["gradient", "value"]
