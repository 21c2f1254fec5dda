"""Wrong arguments of the operators of a static cache are named, with what they must be."""

from __future__ import annotations

import pytest
import torch

from qcompile.ir.static_cache_checks import check_buffers, check_kv_attend, check_kv_write
from qcompile.numerics.kv_words import cache_shapes

KEYS, VALUES, SCALES = cache_shapes(2, 2, 32, 128, 4)
BUFFERS = dict(
    keys=torch.zeros(KEYS, dtype=torch.int16), key_scales=torch.zeros(SCALES, dtype=torch.int32),
    values=torch.zeros(VALUES, dtype=torch.int16), value_scales=torch.zeros(SCALES, dtype=torch.int32),
)  # fmt: skip
LENGTH = torch.tensor(3)


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(bits=5), "bits is 5, but must be 4 or 8"),
        (dict(keys=torch.zeros(2, 2, 100, 8, dtype=torch.int16)), "T a multiple of 128"),
        (dict(keys=torch.zeros(KEYS, dtype=torch.int32)), "keys is int32"),
        (dict(values=torch.zeros(2, 2, 2, 64, 16, dtype=torch.int16)), r"values is .* int16 \[2, 2, 2, 32, 16\]"),
        (dict(value_scales=torch.zeros(2, 2, 64, dtype=torch.int32)), r"value_scales is .*int32 \[2, 2, 128\]"),
        (dict(key_scales=torch.zeros(2, 128, 2, dtype=torch.int32).transpose(1, 2)), "contiguous, but has strides"),
    ],
)
def test_buffers(change, words):
    with pytest.raises(ValueError, match=f"an_op: .*{words}|an_op: {words}"):
        check_buffers("an_op", **(BUFFERS | dict(bits=4) | change))


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(new_keys=torch.zeros(2, 2, 1, 16)), r"new_keys is .*float \[2, 2, N, 32\]"),
        (dict(new_values=torch.zeros(2, 2, 2, 32)), "new_values is .*as new_keys"),
        (dict(length=torch.tensor(3, dtype=torch.int32)), "length is int32"),
        (dict(length=torch.zeros(2, dtype=torch.int64)), "int64 of one value"),
    ],
)
def test_writes(change, words):
    new = dict(new_keys=torch.zeros(2, 2, 1, 32), new_values=torch.zeros(2, 2, 1, 32), length=LENGTH, bits=4)
    check_kv_write(**(BUFFERS | new))
    with pytest.raises(ValueError, match=f"qcompile::kv_write: .*{words}|{words}"):
        check_kv_write(**(BUFFERS | new | change))


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(query=torch.zeros(2, 3, 1, 32)), "a multiple of 2"),
        (dict(query=torch.zeros(1, 4, 1, 32)), r"query is .*\[2, a multiple of 2, N, 32\]"),
        (dict(mask=torch.zeros(2, 1, 100)), r"mask is .*float32 \[2, 1, 128\]"),
        (dict(mask=torch.zeros(2, 1, 128, dtype=torch.bool)), "mask is bool"),
    ],
)
def test_attentions(change, words):
    given = dict(query=torch.zeros(2, 4, 1, 32), length=LENGTH, mask=torch.zeros(2, 1, 128), bits=4)
    check_kv_attend(**(BUFFERS | given))
    with pytest.raises(ValueError, match=words):
        check_kv_attend(**(BUFFERS | given | change))
