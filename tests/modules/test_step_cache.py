"""The cache of a decode step keeps what is new apart, and lets attention see all."""

from __future__ import annotations

import torch

from qcompile.modules.step_cache import step_cache


def test_new_keys_and_values_are_kept_apart():
    parts = [torch.randn(1, 2, 5, 8) for _ in range(4)]
    kept = [part.clone() for part in parts]
    cache = step_cache(parts)
    assert cache.get_seq_length() == 5 and len(cache.layers) == 2
    for index, layer in enumerate(cache.layers):
        new = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
        found = cache.update(*new, index)
        for got, past, one in zip(found, parts[2 * index : 2 * index + 2], new, strict=True):
            assert torch.equal(got, torch.cat([past, one], 2))
        assert all(a is b for a, b in zip(layer.new, new, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parts, kept, strict=True))
