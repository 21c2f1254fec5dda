"""Hadamard matrices for many sizes, and random orthogonal ones for the rest.

A Hadamard matrix has entries +-1 and H H^T = n I. Sizes n = k 2^m are built as H_k (x) H_2^m:
the factor 2^m runs as butterflies, k is 1 or comes from Paley's constructions over a prime q
(Paley 1933): q + 1 for q = 3 mod 4, and 2 (q + 1) for q = 1 mod 4. A randomised one is
diag(signs) H / sqrt(n), orthogonal for any signs (QuaRot, arXiv:2404.00456 sec. 3).
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))


def _paley_kind(k: int) -> Literal[1, 2] | None:
    if k % 4 == 0 and (k - 1) % 4 == 3 and _is_prime(k - 1):
        return 1
    if k % 4 == 0 and k // 2 - 1 > 0 and (k // 2 - 1) % 4 == 1 and _is_prime(k // 2 - 1):
        return 2
    return None


def factor(n: int) -> tuple[int, int] | None:
    """n -> (k, m) with n = k 2^m and a known H_k, k as small as possible; None if there is none."""
    if n < 1:
        return None
    m = (n & -n).bit_length() - 1
    odd = n >> m
    if odd == 1:
        return 1, m
    for take in range(m + 1):
        k = odd << take
        if _paley_kind(k) is not None:
            return k, m - take
    return None


@functools.lru_cache(maxsize=32)
def _core(k: int) -> Tensor:
    """H_k of +-1, float64, by Paley's constructions; k = 1 gives [[1]]."""
    if k == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    kind = _paley_kind(k)
    if kind is None:
        raise ValueError(f"no Hadamard matrix of size {k} is known here")
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


def hadamard_matrix(n: int) -> Tensor:
    """H_n of +-1, [n, n] float64. Raises ValueError for a size without a known one."""
    split = factor(n)
    if split is None:
        raise ValueError(f"no Hadamard matrix of size {n} is known here; use a random orthogonal one")
    k, m = split
    matrix = _core(k)
    for _ in range(m):
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1], [1, -1]]).double())
    return matrix


def apply_hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x [.., n] -> x diag(signs) H_n / sqrt(n), in n (m + k) operations per row."""
    n = x.shape[-1]
    split = factor(n)
    if split is None:
        raise ValueError(f"no Hadamard matrix of size {n} is known here")
    k, m = split
    lead = x.shape[:-1]
    y = (x * signs.to(x.device)).reshape(*lead, k, 2**m)
    for level in range(m):
        half = 2**level
        pairs = y.reshape(*lead, k, 2**m // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(*lead, k, 2**m)
    if k > 1:
        y = torch.einsum("...km,kj->...jm", y, _core(k).to(y))
    return (y * n**-0.5).reshape(*lead, n)


def random_signs(n: int, seed: int) -> Tensor:
    """[n] of +-1, float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def random_orthogonal(n: int, seed: int) -> Tensor:
    """[n, n] float64, Haar-distributed (QR of a Gaussian with the signs of R's diagonal)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotation(n: int, seed: int) -> tuple[Tensor, str]:
    """An orthogonal [n, n] float64 matrix and how it was made, for the report."""
    split = factor(n)
    if split is None:
        return random_orthogonal(n, seed), f"random orthogonal (no Hadamard matrix of {n})"
    matrix = random_signs(n, seed)[:, None] * hadamard_matrix(n) * n**-0.5
    k, m = split
    return matrix, f"randomised Hadamard {k}*{2**m}"
