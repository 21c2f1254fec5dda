"""Words of a quantized cache: they unpack to the same codes and scales, and lie as the drawing says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.kv_words import (
    cache_shapes,
    key_codes,
    key_words,
    scale_words,
    split_words,
    value_codes,
    value_words,
)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_unpack_to_the_codes(bits):
    codes = torch.randint(0, 2**bits, (2, 3, 128, 64)).byte()
    keys, values, scales = cache_shapes(2, 3, 64, 100, bits)
    assert scales == (2, 3, 128)
    assert key_words(codes, bits).shape == keys and value_words(codes, bits).shape == values
    assert torch.equal(key_codes(key_words(codes, bits), bits), codes)
    assert torch.equal(value_codes(value_words(codes, bits), bits), codes)


def test_words_lie_as_drawn():
    codes = torch.randint(0, 16, (128, 64)).byte()
    words = key_words(codes, 4).int() & 0xFFFF
    assert int(words[7, 3]) == sum(int(codes[7, 3 + 16 * c]) << 4 * c for c in range(4))
    words = value_words(codes, 4).int() & 0xFFFF
    assert int(words[1, 9, 5]) == sum(int(codes[64 + 5 + 16 * c, 9]) << 4 * c for c in range(4))
    assert int(value_words(codes, 8).int()[1, 9, 5]) == int(codes[69, 9]) | int(codes[101, 9]) << 8


@given(st.floats(2.0**-24, 65504.0, width=16), st.integers(0, 255), st.sampled_from([4, 8]))
def test_a_word_has_a_scale_and_a_zero_point(scale, zero, bits):
    zero %= 2**bits
    words = scale_words(torch.tensor([scale]), torch.tensor([zero]).byte(), bits)
    assert [float(t) for t in split_words(words, bits)] == [scale, zero]
    if bits == 4:  # what the kernel subtracts, without a conversion
        assert float((words << 16).view(torch.float32)) == 128 + zero
