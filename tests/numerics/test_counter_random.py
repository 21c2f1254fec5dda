"""The counter hash: known bits, uniform, independent, the same compiled; stochastic rounding has the right mean."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.counter_random import derived_stream, hash_counters, round_stochastically, uniform

CPU = torch.device("cpu")


def reference(counter: int, stream: int) -> int:
    """The formula on Python's integers."""
    h = (counter * 0x9E3779B9 + stream) % 2**32
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ (h >> 16)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**40), 2**40))
def test_bits_are_those_of_the_formula(counter, stream):
    got = int(hash_counters(torch.tensor(counter, dtype=torch.int32), stream)) % 2**32
    assert got == reference(counter, stream)


@given(st.integers(0, 2**40), st.integers(0, 2**35))
def test_a_block_continues_where_another_ends(stream, first):
    whole = uniform((12,), stream, device=CPU, first=first)
    assert torch.equal(whole[5:], uniform((7,), stream, device=CPU, first=first + 5))
    assert torch.equal(whole.view(3, 4), uniform((3, 4), stream, device=CPU, first=first))


def test_uniform_and_independent():
    draws = [uniform((1 << 18,), stream, device=CPU).double() for stream in (0, 1, 2, 12345)]
    for draw in draws:
        assert 0 <= float(draw.min()) and float(draw.max()) < 1
        assert abs(float(draw.mean()) - 0.5) < 3 * (1 / 12 / 2**18) ** 0.5
        assert abs(float(draw.var()) * 12 - 1) < 0.01
        assert float(draw.histc(16, 0, 1).sub(2**14).abs().max()) < 5 * 2**7
        assert abs(float(torch.corrcoef(torch.stack([draw[1:], draw[:-1]]))[0, 1])) < 0.01
    others = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert float(others.abs().max()) < 0.01


@given(st.integers(0, 2**31), st.integers(0, 2**62))
def test_streams_of_two_steps_differ(stream, step):
    a, b = (derived_stream(stream, torch.tensor(s)) for s in (step, step + 1))
    assert a.dtype == torch.int32 and int(a) != int(b)
    assert int(a) % 2**32 == reference(step, stream)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_same_bits_compiled(backend):
    def draw(stream):
        return uniform((33, 65), stream, device=CPU)

    stream = torch.tensor(-7, dtype=torch.int32)
    assert torch.equal(torch.compile(draw, backend=backend)(stream), draw(stream))


@given(st.floats(-100, 100, width=32), st.integers(0, 1000))
def test_rounding_gives_a_neighbor_and_keeps_integers(value, stream):
    x = torch.full((256,), value)
    rounded = round_stochastically(x, uniform((256,), stream, device=CPU))
    assert set(rounded.tolist()) <= {float(numpy.floor(value)), float(numpy.ceil(value))}


@given(st.floats(-8, 8), st.integers(0, 100))
def test_rounding_is_unbiased(value, stream):
    count = 100_000
    rounded = round_stochastically(
        torch.full((count,), value, dtype=torch.float64), uniform((count,), stream, device=CPU).double()
    )
    fraction = value - numpy.floor(value)
    assert abs(float(rounded.mean()) - value) < 4 * (fraction * (1 - fraction) / count) ** 0.5 + 1e-5
