"""The C++ kernels of fixed-point training give the bits of their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.codegen.cpu import training_kernels
from qcompile.codegen.cpu.training_kernels import CpuRounding, install_cpu_rounding
from qcompile.numerics import code_rounding
from qcompile.numerics.code_rounding import changed_codes, gradient_codes, value_codes
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

STEP = torch.tensor(0.25)
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([4095, 4096, 4097, 70_001]))


@pytest.fixture(scope="module")
def kernels():
    return CpuRounding()


@pytest.fixture(autouse=True)
def definitions(monkeypatch):
    monkeypatch.setattr(code_rounding, "_installed", {})


def awkward(n, seed):
    """Values of many sizes, exact multiples of the step among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 6)
    x[::5] = torch.randint(-9, 10, x[::5].shape, generator=generator) * 0.25
    return x


@given(SIZES, st.integers(0, 99), st.sampled_from([1, 7, 127]), st.integers(-(2**31), 2**31 - 1))
def test_gradients(kernels, n, seed, levels, stream):
    g = awkward(n, seed)
    step = torch.tensor(0.25)
    for draw in (None, torch.tensor(stream, dtype=torch.int32)):
        got, want = (f(g, step, step * levels, levels, draw) for f in (kernels.gradient_codes, gradient_codes))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@given(SIZES, st.integers(0, 99), st.sampled_from([(-7, 7), (0, 15)]))
def test_values(kernels, n, seed, bounds):
    x = awkward(n, seed)
    for got, want in zip(kernels.value_codes(x, STEP, *bounds), value_codes(x, STEP, *bounds), strict=True):
        assert torch.equal(got, want)


@given(st.integers(1, 9), st.integers(1, 600), st.integers(0, 99), st.sampled_from([0.0, 0.01]), st.booleans())
def test_changes(kernels, n, k, seed, decay, stochastic):
    weight = quantize_tensor(torch.randn(n, k), Format.parse("int8/group256/zero"))
    change = awkward(n * k, seed).view(n, k)
    change[0] = 0
    draw = torch.tensor(seed * 77_777_777 % 2**31, dtype=torch.int32) if stochastic else None
    got, want = kernels.changed_codes(weight, change, decay, draw), changed_codes(weight, change, decay, draw)
    for a, b in zip(got.parts[:3], want.parts[:3], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


def test_changes_that_no_code_holds_and_other_formats(kernels):
    weight = quantize_tensor(torch.randn(4, 300), Format.parse("int8/group256/zero"))
    for value in (float("nan"), float("inf"), 3e38):
        change = torch.full((4, 300), 0.1)
        change[2, 290], change[2, 291] = value, -value
        with pytest.raises(ValueError, match="NaN or Inf, which no code can hold"):
            kernels.changed_codes(weight, change, 0.0, None)
    other = quantize_tensor(torch.randn(4, 300), Format.parse("int8/group256"))
    assert kernels.changed_codes(other, torch.zeros(4, 300), 0.0, None) is None


def test_nan_and_infinity(kernels):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -0.0])
    one = torch.tensor(1.0)
    for draw in (None, torch.tensor(3, dtype=torch.int32)):
        got, want = (f(x, one, 7 * one, 7, draw) for f in (kernels.gradient_codes, gradient_codes))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[0][:4].tolist() == [0, 7, -7, 1]
    codes, lost = kernels.value_codes(x, one, -7, 7)
    assert bool(lost) and codes.tolist() == [0, 7, -7, 1, 0]
    assert not bool(kernels.value_codes(x[1:], one, -7, 7)[1])


def test_a_machine_without_a_compiler_says_so_and_trains(monkeypatch):
    def fail():
        raise OSError("no compiler here")

    monkeypatch.setattr(training_kernels, "CpuRounding", fail)
    install_cpu_rounding.cache_clear()
    with pytest.warns(UserWarning, match=r"cannot be built \(no compiler here\), so PyTorch rounds.*install g\+\+"):
        install_cpu_rounding()
    install_cpu_rounding.cache_clear()
    assert code_rounding._installed == {}
