"""Hadamard matrices of many sizes, and random orthogonal ones for the rest.

A Hadamard matrix has entries +-1 and H H^T = n I. Sizes n = k 2^m are built as H_k (x) H_2^m:
the factor 2^m runs as butterflies, k is 1 or comes from Paley's constructions over a prime q
(Paley 1933): q + 1 for q = 3 mod 4, and 2 (q + 1) for q = 1 mod 4. A randomized one is
diag(signs) H / sqrt(n), orthogonal for any signs (QuaRot, arXiv:2404.00456 sec. 3).
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor


def hadamard_factors(n: int) -> tuple[int, int] | None:
    """n -> (k, m) with n = k 2^m and a known H_k, k as small as possible; None if there is none."""
    if n < 1:
        return None
    m = (n & -n).bit_length() - 1
    odd = n >> m
    if odd == 1:
        return 1, m
    for doublings in range(m + 1):
        k = odd << doublings
        if _paley_construction(k) is not None:
            return k, m - doublings
    return None


def hadamard_matrix(n: int) -> Tensor:
    """H_n of +-1, [n, n] float64.

    Raises:
        ValueError: no Hadamard matrix of this size is known.
    """
    k, m = _factors(n)
    matrix = _paley_matrix(k)
    for _ in range(m):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1], [1, -1]]).double())
    return matrix


def apply_hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x diag(signs) H_n / sqrt(n), in n (m + k) operations per row.

    Args:
        x: float [.., n].
        signs: [n] of +-1, of the dtype of x.

    Raises:
        ValueError: no Hadamard matrix of size n is known.
    """
    return _times_hadamard(x * signs.to(x.device))


def undo_hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x H_n^T diag(signs) / sqrt(n): the inverse of `apply_hadamard`, with the same arguments."""
    return _times_hadamard(x, transposed=True) * signs.to(x.device)


def _times_hadamard(x: Tensor, transposed: bool = False) -> Tensor:
    """x H_n / sqrt(n), or x H_n^T / sqrt(n); the butterflies are symmetric, Paley's matrices need not be."""
    n = x.shape[-1]
    k, m = _factors(n)
    lead = x.shape[:-1]
    y = x.reshape(*lead, k, 1 << m)
    for level in range(m):
        half = 1 << level
        pairs = y.reshape(*lead, k, (1 << m) // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(*lead, k, 1 << m)
    if k > 1:
        paley = _paley_matrix(k).to(y)
        y = torch.einsum("...km,kj->...jm", y, paley.t() if transposed else paley)
    rotated: Tensor = (y * n**-0.5).reshape(*lead, n)
    return rotated


def random_signs(n: int, seed: int) -> Tensor:
    """[n] of +-1, float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def random_orthogonal(n: int, seed: int) -> Tensor:
    """[n, n] float64, Haar-distributed (QR of a Gaussian with the signs of R's diagonal)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    orthogonal: Tensor = q * r.diagonal().sign()
    return orthogonal


def random_rotation(n: int, seed: int) -> tuple[Tensor, str]:
    """A randomized Hadamard matrix where one of the size is known, else a random orthogonal one.

    Returns:
        The matrix, orthogonal, [n, n] float64; and its kind, for reports.
    """
    factors = hadamard_factors(n)
    if factors is None:
        return random_orthogonal(n, seed), f"random orthogonal (no Hadamard matrix of {n})"
    matrix = random_signs(n, seed)[:, None] * hadamard_matrix(n) * n**-0.5
    k, m = factors
    return matrix, f"randomized Hadamard {k}*{2**m}"


def _factors(n: int) -> tuple[int, int]:
    factors = hadamard_factors(n)
    if factors is None:
        raise ValueError(f"no Hadamard matrix of size {n} is known. Fix: use a random orthogonal matrix")
    return factors


def _paley_construction(k: int) -> Literal[1, 2] | None:
    """Which of Paley's constructions gives H_k over a prime; k >= 3."""
    if k % 4 == 0 and (k - 1) % 4 == 3 and _is_prime(k - 1):
        return 1
    if k % 4 == 0 and (k // 2 - 1) % 4 == 1 and _is_prime(k // 2 - 1):
        return 2
    return None


def _is_prime(number: int) -> bool:
    """Of a number above 1."""
    return all(number % d for d in range(2, int(number**0.5) + 1))


@functools.lru_cache(maxsize=32)
def _paley_matrix(k: int) -> Tensor:
    """H_k of +-1, [k, k] float64, by Paley's constructions; k = 1 gives [[1]]."""
    if k == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    kind = _paley_construction(k)
    if kind is None:
        raise ValueError(f"no Hadamard matrix of size {k} follows from Paley's constructions")
    q = k - 1 if kind == 1 else k // 2 - 1
    squares = {(i * i) % q for i in range(1, q)}
    residue = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = (torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q
    jacobsthal = residue[index]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:] = 1
    conference[1:, 0] = -1 if kind == 1 else 1
    conference[1:, 1:] = jacobsthal
    eye = torch.eye(q + 1, dtype=torch.float64)
    if kind == 1:
        return eye + conference
    return torch.kron(conference, torch.tensor([[1.0, 1], [1, -1]]).double()) + torch.kron(
        eye, torch.tensor([[1.0, -1], [-1, -1]]).double()
    )
