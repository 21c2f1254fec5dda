"""Blocks cover all elements once, in order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.cache_blocks import BLOCK, cache_blocks


@given(st.integers(0, 5 * BLOCK), st.sampled_from(["cpu", "meta"]))
def test_all_elements_once(count, device):
    found = [index for part in cache_blocks(count, torch.device(device)) for index in (part.start, part.stop)]
    assert found[:1] == [0][: len(found)] and found[1:-1:2] == found[2::2]
    assert (found[-1] if found else 0) == count
    assert len(found) <= 2 or device == "cpu"
