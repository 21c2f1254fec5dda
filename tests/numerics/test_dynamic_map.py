"""8-bit optimizer moments: the map, and the error of a block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.dynamic_map import BLOCK, _nearest, dynamic_map, from_codes, to_codes


@pytest.mark.parametrize("signed", [True, False])
def test_the_map(signed):
    values = dynamic_map(signed)
    assert len(values) == 256 and bool((values.diff() > 0).all()) and float(values[-1]) == 1 and 0 in values
    top = values[(values > 0.1) & (values < 1)]
    assert len(top) == (64 if signed else 128)
    if signed:
        assert torch.equal(values[:127], -values[128:255].flip(0)) and float(values[127]) == 0
    else:
        assert float(values[0]) == 0


@pytest.mark.parametrize("signed", [True, False])
def test_it_is_the_map_of_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.allclose(functional.create_dynamic_map(signed=signed), dynamic_map(signed), rtol=1e-6, atol=0)


@given(size=st.integers(1, 700), signed=st.booleans(), seed=st.integers(0, 99), power=st.integers(-20, 20))
def test_each_value_becomes_the_nearest_of_the_map(size, signed, seed, power):
    torch.manual_seed(seed)
    x = torch.randn(size) * 10.0**power
    x = x if signed else x.abs()
    codes, scale = to_codes(x, signed)
    assert codes.shape == x.shape and codes.dtype == torch.uint8 and len(scale) == -(-size // BLOCK)
    scales = scale.repeat_interleave(BLOCK)[:size]
    distance = (x[:, None] / scales[:, None] - dynamic_map(signed)).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    small = distance.new_tensor(0.0 if signed else float(dynamic_map(False)[1]))  # no zero for positive values
    assert bool((chosen <= distance.amin(1).maximum(small) + 1e-7).all())
    assert signed or torch.equal(codes == 0, x == 0)
    assert torch.allclose(from_codes(codes, scale, signed), dynamic_map(signed)[codes.long()] * scales)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_a_binary_search(signed):
    """Both ends of each interval of floats that a table's entry stands for, and each edge itself."""
    values = dynamic_map(signed)
    edges = (values[:-1] + values[1:]) / 2
    edges[0] = edges[0] if signed else 0.0
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    bits = torch.cat([upper, upper | 0xFFFF, upper | 0x7FFF])
    x = torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)
    x = torch.cat([x[x.abs() <= 1], edges, torch.nextafter(edges, edges + 1), values])
    x = x if signed else x[x >= 0]
    assert torch.equal(_nearest(x, signed).int(), torch.bucketize(x, edges, out_int32=True))


def test_a_block_of_zeros_stays():
    codes, scale = to_codes(torch.zeros(300), True)
    assert not from_codes(codes, scale, True).any() and not scale.any()


def test_stored_twice_is_stored_once():
    x = torch.randn(10, 77)
    once = from_codes(*to_codes(x, True), True)
    assert torch.equal(from_codes(*to_codes(once, True), True), once)
