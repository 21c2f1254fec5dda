"""What is made from equal weights is made once; what is made from others is not."""

from __future__ import annotations

import torch

from qcompile.memory import weight_cache
from qcompile.memory.weight_cache import cached


def weight(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_equal_sources_are_made_once():
    made = []
    first, second = weight(8, 8), weight(8, 8)
    entries = [cached("k", [w, w], lambda: made.append(1) or (torch.ones(1),)) for w in (first, second, first[:])]
    assert len(made) == 1 and entries[0] is entries[1] is entries[2]
    other = cached("other", [first, first], lambda: made.append(1) or (torch.ones(1),))
    assert len(made) == 2 and other is not entries[0]
    before = weight_cache.entry_count()
    del entries, other
    assert weight_cache.entry_count() == before - 2


def test_equal_fingerprints_of_others_are_not_enough(monkeypatch):
    monkeypatch.setattr(weight_cache, "fingerprint", lambda tensor: "the same")
    first, second = weight(8, 8), weight(8, 8, seed=1)
    a = cached("k", [first], lambda: (first + 1,))
    b = cached("k", [second], lambda: (second + 1,))
    assert torch.equal(a.tensors[0], first + 1) and torch.equal(b.tensors[0], second + 1)
    assert cached("k", [second.clone()], lambda: (second,)) is b
    nan = torch.full((4,), torch.nan)  # not equal to itself as a value
    assert cached("nan", [nan], lambda: (nan,)) is cached("nan", [nan.clone()], lambda: (nan,))


def test_a_source_that_is_gone_is_not_kept():
    source = weight(8, 8)
    copy = source.clone()
    entry = cached("k", [source], lambda: (torch.ones(1),))
    del source
    assert entry._sources[0]._storage.expired()
    assert cached("k", [copy], lambda: (torch.zeros(1),)) is entry


def test_a_source_that_was_written_to_since_is_made_anew():
    source = weight(8, 8)
    copy = source.clone()
    entry = cached("k", [source], lambda: (source + 0,))
    source.mul_(2)
    again = cached("k", [copy], lambda: (copy + 0,))
    assert again is not entry and torch.equal(again.tensors[0], copy)
