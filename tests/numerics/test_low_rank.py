"""Low-rank gradients: projecting before the product, the basis, when a new one is due."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics import low_rank
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

sizes = st.integers(2, 24)


@given(rows=sizes, columns=sizes, tokens=sizes, rank=st.integers(1, 24), seed=st.integers(0, 99))
def test_projecting_before_the_product_is_projecting_the_gradient(rows, columns, tokens, rank, seed):
    """Law P: (g^T x) P^T = g^T (x P^T), on both sides, for any P."""
    torch.manual_seed(seed)
    x, g = torch.randn(tokens, columns, dtype=torch.float64), torch.randn(tokens, rows, dtype=torch.float64)
    left = low_rank.is_left(rows, columns)
    basis = torch.randn(min(rank, rows, columns), min(rows, columns), dtype=torch.float64)
    full = g.t() @ x
    expected = basis @ full if left else full @ basis.t()
    assert torch.allclose(low_rank.project(x, g, basis, left), expected, rtol=1e-12, atol=1e-10)


@given(rows=sizes, columns=sizes, seed=st.integers(0, 99))
def test_the_basis_is_the_best_one(rows, columns, seed):
    """Rows are orthonormal, and keep of the gradient what its best approximation of that rank is (Eckart-Young)."""
    torch.manual_seed(seed)
    gradient = torch.randn(rows, columns, dtype=torch.float64)
    left, rank = low_rank.is_left(rows, columns), max(1, min(rows, columns) // 2)
    basis = low_rank.singular_basis(gradient, rank, left)
    assert basis.shape == (rank, min(rows, columns))
    assert torch.allclose(basis @ basis.t(), torch.eye(rank, dtype=torch.float64), atol=1e-12)
    projected = basis @ gradient if left else gradient @ basis.t()
    kept = low_rank.expand(projected, basis, left)
    values = torch.linalg.svdvals(gradient)
    assert torch.isclose((gradient - kept).norm(), values[rank:].norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_gradient_without_a_basis(bad):
    gradient = (
        torch.zeros(6, 4)
        if bad is None
        else torch.randn(6, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(bad))
    )
    assert low_rank.singular_basis(gradient, 2, False) is None


def test_a_decomposition_that_does_not_converge(monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert low_rank.singular_basis(torch.randn(6, 4), 2, False) is None


@pytest.mark.parametrize(("rank", "length"), [(32, 512), (64, 512), (16, 300)])
def test_a_basis_in_int4_is_nearly_orthonormal(rank, length):
    basis = low_rank.singular_basis(torch.randn(2 * length, length), rank, False)
    stored = quantize_tensor(basis, Format.parse("int4/group256/zero")).dequantize()
    assert float(torch.linalg.matrix_norm(stored @ stored.t() - torch.eye(rank), 2)) < 0.2


def test_similarity_knows_no_sign():
    a, b = torch.randn(30), torch.randn(30)
    assert low_rank.similarity(a, b) == low_rank.similarity(-a, b) and low_rank.similarity(a, -2 * a) == pytest.approx(
        1
    )
    assert low_rank.similarity(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)


@given(
    similarities=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6),
    known=st.integers(0, 8),
    threshold=st.floats(0, 1, width=32),
)
def test_the_interval_grows_only_with_a_full_queue(similarities, known, threshold):
    values = torch.tensor(similarities)
    grown = low_rank.next_gap(10, values, known, threshold, 3)
    assert grown == (30 if known >= len(similarities) and float(values.mean()) >= threshold else 10)
