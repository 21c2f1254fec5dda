"""Hadamard matrices of the known sizes, their fast application, random rotations."""

from __future__ import annotations

import pytest
import torch

from qcompile.numerics.hadamard import (
    apply_hadamard,
    hadamard_factors,
    hadamard_matrix,
    random_orthogonal,
    random_rotation,
    random_signs,
    undo_hadamard,
)

SIZES = [1, 2, 4, 12, 20, 24, 28, 36, 44, 60, 64, 576, 1536]


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_orthogonal(n):
    h = hadamard_matrix(n)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.t(), n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", SIZES)
def test_butterflies_are_the_matrix(n):
    x, signs = torch.randn(3, n, dtype=torch.float64), random_signs(n, 1)
    want = x @ (signs[:, None] * hadamard_matrix(n)) / n**0.5
    assert torch.allclose(apply_hadamard(x, signs), want, atol=1e-12)


@pytest.mark.parametrize("n", [22, 52, 576, 64, 11008 // 64])
def test_rotation_is_orthogonal_and_repeatable(n):
    matrix, kind = random_rotation(n, 7)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.equal(matrix, random_rotation(n, 7)[0]) and not torch.equal(matrix, random_rotation(n, 8)[0])
    assert ("Hadamard matrix of" in kind) == (hadamard_factors(n) is None)


def test_known_factors():
    assert (
        hadamard_factors(576) == (36, 4)
        and hadamard_factors(1536) == (12, 7)
        and hadamard_factors(2048) == (1, 11)
        and hadamard_factors(14336) == (28, 9)
    )
    assert hadamard_factors(22) is None and hadamard_factors(0) is None


def test_a_rotation_is_that_of_the_transform():
    matrix, kind = random_rotation(576, 7)
    assert kind == "randomized Hadamard 36*16"
    assert torch.allclose(matrix, apply_hadamard(torch.eye(576).double(), random_signs(576, 7)), atol=1e-12)


def test_random_orthogonal_matrices_have_the_haar_measure():
    """Q of a Gaussian Q R whose R has a positive diagonal: there is one such Q."""
    gaussian = torch.randn(9, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    r = random_orthogonal(9, 3).t() @ gaussian
    assert torch.allclose(r, r.triu(), atol=1e-12) and bool((r.diagonal() > 0).all())


@pytest.mark.parametrize("n", [1, 8, 12, 20, 28, 40])
def test_undoing_is_the_inverse(n):
    """Paley's matrices are not symmetric: transposing them matters."""
    x, signs = torch.randn(3, n).double(), random_signs(n, 1)
    assert torch.allclose(undo_hadamard(apply_hadamard(x, signs), signs), x, atol=1e-12)
