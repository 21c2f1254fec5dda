"""The cache of a decode step keeps what is new apart, and lets attention see all."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from qcompile.modules.kv_cache import KVCache
from qcompile.modules.step_cache import step_cache


def test_new_keys_and_values_are_kept_apart():
    parts = [torch.randn(1, 2, 5, 8) for _ in range(4)]
    kept = [part.clone() for part in parts]
    like = DynamicCache()
    for index in range(2):
        like.update(*parts[2 * index : 2 * index + 2], index)
    cache = step_cache(like, [torch.cat([part, torch.full_like(part, torch.nan)], 2) for part in parts], 5)
    assert cache.get_seq_length() == 5 and len(cache.layers) == 2
    for index, layer in enumerate(cache.layers):
        new = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
        found = cache.update(*new, index)
        for got, past, one in zip(found, parts[2 * index : 2 * index + 2], new, strict=True):
            assert torch.equal(got, torch.cat([past, one], 2))
        assert all(a is b for a, b in zip(layer.new, new, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("hadamard", [False, True])
def test_a_quantized_cache_is_read_as_it_reads_itself(bits, sinks, hadamard):
    kept = KVCache(bits, sink_tokens=sinks, hadamard=hadamard, centers=[torch.randn(2, 16)] * 2)
    for index in range(2):
        kept.update(torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16), index)
    parts = [part for layer in kept.layers for part in (*layer.floats, *layer.reserve(3))]
    cache, whole = step_cache(kept, parts, 7), copy.deepcopy(kept)
    assert cache.get_seq_length() == 7
    for index, layer in enumerate(cache.layers):
        new = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16)
        for got, want in zip(cache.update(*new, index), whole.update(*new, index), strict=True):
            assert torch.equal(got, want)
        for buffer, rows in zip(kept.layers[index].reserve(1), layer.new, strict=True):
            buffer[:, :, kept.layers[index].used] = rows[:, :, 0]
        kept.layers[index].advance(1)
    for a, b in zip(kept.layers, whole.layers, strict=True):
        assert torch.equal(a.own_keys.read(torch.float32), b.own_keys.read(torch.float32))
        assert torch.equal(a.own_values.read(torch.float32), b.own_values.read(torch.float32))
