"""What a GPU runs for the operators of a static cache computes what their definitions do; what it refuses."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE
from kv_caches import empty_cache, random_states

from qcompile.codegen.triton.triton_kv_ops import (
    MAX_POSITIONS,
    has_kv_kernel,
    kv_attend_by_kernel,
    kv_read_by_kernel,
    kv_write_by_kernel,
)
from qcompile.ir.static_cache_ops import attend_in_torch, kv_write, read_in_torch

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the definition runs on a CPU")


def both(bits, width, tokens, dtype=torch.bfloat16):
    """Buffers written by the definition, and by the kernel."""
    found, states = [], [random_states(1, 2, tokens, width, seed=seed, dtype=dtype) for seed in (1, 2)]
    for write in (kv_write, kv_write_by_kernel):
        cache = empty_cache(1, 2, width, 256, bits)
        buffers = list(cache.arguments.values())
        for start, end in ((0, tokens - 1), (tokens - 1, tokens)):
            cache.length.fill_(start)
            write(*(t[:, :, start:end] for t in states), *buffers, bits)
        cache.length.fill_(tokens)
        found.append(buffers)
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernels_are_the_definitions(bits, masked):
    by_torch, by_kernel = both(bits, 64, 140)
    assert all(torch.equal(a, b) for a, b in zip(by_torch, by_kernel, strict=True))
    query = random_states(1, 6, 2, 64, seed=3).bfloat16()
    mask = torch.randn(1, 2, 256) if masked else None
    got = kv_attend_by_kernel(query, *by_kernel, mask, 0.1, bits)
    want = attend_in_torch(query, *by_torch, mask, 0.1, bits)
    assert got.dtype == want.dtype and float((got - want).float().norm() / want.float().norm()) < 6e-3


@pytest.mark.parametrize("bits,width", [(4, 64), (8, 64), (4, 128), (4, 80)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_read_is_the_definition_to_the_bit(bits, width, dtype):
    cache = empty_cache(2, 1, width, 256, bits)
    states = [random_states(2, 1, 150, width, seed=seed) for seed in (1, 2)]
    buffers = list(cache.arguments.values())
    kv_write(*states, *buffers, bits)
    for got, want in zip(*(f(*buffers[:4], bits, dtype) for f in (kv_read_by_kernel, read_in_torch)), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)


def test_many_positions_and_other_dtypes_are_the_definition():
    assert has_kv_kernel(128, 1, torch.bfloat16) and not has_kv_kernel(80, 1, torch.bfloat16)
    assert not has_kv_kernel(128, 1, torch.float16) and not has_kv_kernel(64, MAX_POSITIONS + 1, torch.bfloat16)
    buffers, _ = both(4, 64, 100)
    query = random_states(1, 2, 30, 64, seed=3)
    got, want = (f(query, *buffers, None, 0.1, 4) for f in (kv_attend_by_kernel, attend_in_torch))
    assert torch.equal(got, want)


def test_widths_without_a_kernel_are_named():
    new, cache = random_states(1, 2, 1, 80), empty_cache(1, 2, 80, 128, 4)
    with pytest.raises(ValueError, match=r"new_keys is float32 \[1, 2, 1, 80\].*D one of \(64, 128, 256\)"):
        kv_write_by_kernel(new, new, *cache.arguments.values(), 4)
