"""Products of codes are those of Python's integers, in every layout that training asks for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import code_matmul as subject
from qcompile.numerics import int8_matmul
from qcompile.numerics.code_matmul import code_matmul, cuda_matmul

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


def cublas(x, weight):
    """Refuses what `_int_mm` refuses on CUDA, and what is slow there."""
    (m, k), n = x.shape, len(weight)
    assert m > 16 and k % 8 == 0 and n % 8 == 0 and 0 < k <= int8_matmul.MAX_K and weight.shape[1] == k
    assert x.is_contiguous() and weight.is_contiguous()
    return (x.long() @ weight.long().t()).int()


@given(SIZES, SIZES, SIZES, st.integers(0, 9))
def test_three_layouts_in_the_sizes_that_cuda_takes(m, n, k, seed):
    x, w, g = codes(seed, m, k), codes(seed + 1, n, k), codes(seed + 2, m, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "int8_matmul", cublas)
        for a, b in ((x, w), (g, w.t()), (g.t(), x.t())):
            assert torch.equal(cuda_matmul(a, b).long(), a.long() @ b.long().t())


def test_transposed_codes_become_dense_along_the_terms(monkeypatch):
    """Also those that need no padding."""
    monkeypatch.setattr(subject, "int8_matmul", cublas)
    x, weight = codes(0, 32, 64).t(), codes(1, 32, 16).t()
    assert torch.equal(cuda_matmul(x, weight).long(), x.long() @ weight.long().t())


def test_no_copy_where_cuda_takes_the_codes_as_they_are(monkeypatch):
    seen = []
    monkeypatch.setattr(subject, "int8_matmul", lambda x, weight: seen.append((x, weight)) or cublas(x, weight))
    x, weight = codes(0, 64, 32), codes(1, 16, 32)
    cuda_matmul(x, weight)
    assert seen[0][0].data_ptr() == x.data_ptr() and seen[0][1].data_ptr() == weight.data_ptr()


def test_what_multiplies_on_a_device():
    assert subject.matmul_on("cuda") == (cuda_matmul, 131_064)
    assert subject.matmul_on("cpu") == (int8_matmul.int8_matmul, 131_071)


@pytest.mark.parametrize("columns", [131_064, 131_065, 131_071, 262_150])
def test_cuda_sums_no_more_than_int32_holds_when_padded(columns, monkeypatch):
    on_cuda = subject.matmul_on("cuda")
    monkeypatch.setattr(subject, "matmul_on", lambda device_type: on_cuda)
    monkeypatch.setattr(subject, "int8_matmul", cublas)
    x, weight = (torch.full((rows, columns), -128, dtype=torch.int8) for rows in (3, 5))
    assert (code_matmul(x, weight) == 2**14 * columns).all()


def test_nothing_to_sum():
    assert not code_matmul(codes(0, 3, 0), codes(0, 2, 0)).any()
    assert code_matmul(codes(0, 0, 4), codes(0, 2, 4)).shape == (0, 2)
