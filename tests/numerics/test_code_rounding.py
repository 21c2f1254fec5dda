"""The definitions of rounding to codes, and that a target's kernels are used where they apply, and only there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import cache_blocks, code_rounding
from qcompile.numerics.code_rounding import changed_codes, gradient_codes, install_rounding_kernels, value_codes
from qcompile.numerics.code_update import add_to_codes
from qcompile.numerics.counter_random import uniform
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


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
    monkeypatch.setattr(cache_blocks, "BLOCK", 1000)
    assert torch.equal(gradient_codes(g, one, 7 * one, 7, seven)[0], codes)


def test_values_are_clamped_and_nan_is_told(definitions):
    x, step = torch.tensor([-3.0, -1.0, 0.0, 0.4, 2.0, 3.0]), torch.tensor(0.5)
    codes, lost = value_codes(x, step, -4, 4)
    assert codes.tolist() == [-4, -2, 0, 1, 4, 4] and not lost
    assert value_codes(x, step, 0, 4)[0].tolist() == [0, 0, 0, 1, 4, 4]
    codes, lost = value_codes(torch.tensor([1.0, float("nan")]), step, -4, 4)
    assert lost and codes.tolist() == [2, 0]


def test_a_change_is_added_with_the_noise_of_its_stream(definitions):
    form = Format.parse("int8/group32/zero")
    weight, change = quantize_tensor(torch.randn(4, 80), form), torch.randn(4, 80) * 1e-3
    draw = torch.tensor(5, dtype=torch.int32)
    for stream, noise in ((None, None), (draw, uniform((4, 80), draw, device=change.device))):
        got, want = changed_codes(weight, change, 0.1, stream), add_to_codes(weight, change, 0.1, noise)
        assert all(torch.equal(a, b) for a, b in zip(got.parts[:3], want.parts[:3], strict=True))


def test_kernels_are_used_for_dense_float32_of_their_device_only(definitions):
    calls = []

    class Kernels:
        def gradient_codes(self, gradient, *rest):
            calls.append("gradient")
            return gradient.to(torch.int8), torch.zeros((), dtype=torch.int64)

        def value_codes(self, x, *rest):
            calls.append("value")
            return x.to(torch.int8), torch.tensor(False)

        def changed_codes(self, *rest):
            calls.append("none of this format")

    one = torch.tensor(1.0)
    weight = quantize_tensor(torch.randn(4, 80), Format.parse("int8/group32/zero"))
    install_rounding_kernels("cpu", Kernels())
    gradient_codes(torch.randn(4), one, one, 7, None)
    value_codes(torch.randn(4), one, -7, 7)
    assert changed_codes(weight, torch.zeros(4, 80), 0.0, None).codes.equal(weight.codes)
    expected = ["gradient", "value", "none of this format"]
    assert calls == expected
    value_codes(torch.randn(8)[::2], one, -7, 7)
    gradient_codes(torch.randn(4).double(), one, one, 7, None)
    install_rounding_kernels("cpu", None)
    gradient_codes(torch.randn(4), one, one, 7, None)
    assert calls == expected
