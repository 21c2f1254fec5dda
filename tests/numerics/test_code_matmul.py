"""Products of codes are those of Python's integers, in every layout that training asks for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import code_matmul as subject
from qcompile.numerics.code_matmul import code_matmul

SIZES = st.integers(1, 40)


def codes(seed, *shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


@given(SIZES, SIZES, SIZES, st.integers(0, 9))
def test_three_layouts(m, n, k, seed):
    x, w, g = codes(seed, m, k), codes(seed + 1, n, k), codes(seed + 2, m, n)
    for a, b in ((x, w), (g, w.t()), (g.t(), x.t())):
        assert torch.equal(code_matmul(a, b).long(), a.long() @ b.long().t())


@given(SIZES, st.integers(0, 9))
def test_more_terms_than_int32_is_safe_for(k, seed):
    x, w = codes(seed, 3, k), codes(seed + 1, 5, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "MAX_K", 7)
        found = code_matmul(x, w)
    assert found.dtype == (torch.int64 if k > 7 else torch.int32)
    assert torch.equal(found.long(), x.long() @ w.long().t())


def test_nothing_to_sum():
    assert not code_matmul(codes(0, 3, 0), codes(0, 2, 0)).any()
    assert code_matmul(codes(0, 0, 4), codes(0, 2, 4)).shape == (0, 2)
