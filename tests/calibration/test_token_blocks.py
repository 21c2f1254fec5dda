"""Blocks of batches: all of them, in order, short ones joined, and enough for several processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.calibration.token_blocks import token_blocks


def batches_of(lengths, rows=1):
    return [[torch.zeros(rows, length, dtype=torch.int64), 3] for length in lengths]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.integers(1, 3))
def test_blocks_are_all_batches_in_order_and_none_is_too_short(lengths, rows):
    sizes = token_blocks(batches_of(lengths, rows))
    assert sum(sizes) == len(lengths) and all(size > 0 for size in sizes)
    enough = max(256, min(4096, rows * sum(lengths) // 16))
    start = 0
    for index, size in enumerate(sizes):
        own = [rows * length for length in lengths[start : start + size]]
        assert sum(own[:-1]) < enough, "a batch joins only a block that is too short"
        assert sum(own) >= enough or index == len(sizes) - 1
        start += size


@pytest.mark.parametrize(
    "lengths, sizes",
    [
        ([], []),
        ([10], [1]),
        ([256] * 16, [1] * 16),
        ([2048] * 4, [1] * 4),
        ([100] * 7, [3, 3, 1]),
        ([64] * 64, [4] * 16),
        ([64] * 128, [8] * 16),
    ],
)
def test_sizes_of_blocks(lengths, sizes):
    assert token_blocks(batches_of(lengths)) == sizes


def test_tokens_are_those_of_the_longest_input():
    """Images and scalars count for what their first two dimensions say; a batch without tensors for nothing."""
    batch = [torch.zeros(2, 100), torch.zeros(3, 100, 7), torch.tensor(1.0), None]
    assert token_blocks([batch] * 4) == [1] * 4
    assert token_blocks([[torch.tensor(1.0)], [None], [5]]) == [3]
    assert token_blocks([[torch.zeros(300)], [torch.zeros(300)]]) == [1, 1]
