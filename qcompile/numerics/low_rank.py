"""Gradients of a weight in a low-rank basis: the projection, the basis, and when to look for a new one.

    weight W [N, K], gradient G = g^T x of x [T, K] and g [T, N]
    right (N >= K)  P [r, K]   projected  G P^T = g^T (x P^T)      [N, r]     expanded  L P
    left  (N < K)   P [r, N]   projected  P G   = (g P^T)^T x      [r, K]     expanded  P^T L

The rows of P are the first r singular vectors of G on its shorter side. Projecting before the product costs
2 T r (N + K) in place of 2 T N K + 2 N K r, and G itself is never made.

Source: GaLore (arXiv:2403.03507, algorithm 2); Q-GaLore (arXiv:2407.08296, sec. 3.2): the interval between two bases
        is multiplied where the first vectors of consecutive bases were alike, on average |cos| >= 0.4 over the last
        five.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.whole_tensor import is_finite, is_zero


def is_left(rows: int, columns: int) -> bool:
    """Whether the basis of a weight [rows, columns] multiplies it from the left: the shorter side is projected."""
    return rows < columns


def project(x: Tensor, gradient: Tensor, basis: Tensor, left: bool) -> Tensor:
    """The projected gradient of a weight, without the gradient itself.

    Args:
        x: [T, K].
        gradient: of the product, [T, N].
        basis: P, [r, N] if left, else [r, K], of the dtype of both.
        left: see `is_left`.

    Returns:
        [r, K] if left, else [N, r].
    """
    if left:
        return (gradient @ basis.t()).t() @ x
    return gradient.t() @ (x @ basis.t())


def expand(low: Tensor, basis: Tensor, left: bool) -> Tensor:
    """From the basis back to the weight: `low` [r, K] (left) or [N, r] -> [N, K]."""
    return basis.t() @ low if left else low @ basis


def singular_basis(gradient: Tensor, rank: int, left: bool) -> Tensor | None:
    """The first `rank` singular vectors of a gradient [N, K], as rows.

    Returns:
        [rank, N] if left, else [rank, K]; None where the gradient has none: NaN or Inf in it, nothing but zeros, or a
        decomposition that does not converge.
    """
    if not is_finite(gradient) or is_zero(gradient):
        return None
    try:
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    basis: Tensor = u[:, :rank].t() if left else vh[:rank]
    return basis.contiguous()


def similarity(a: Tensor, b: Tensor) -> float:
    """|cos| of two vectors: a singular vector is known up to its sign only."""
    return abs(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))


def next_gap(gap: int, similarities: Tensor, known: int, threshold: float, factor: int) -> int:
    """The interval until the next basis.

    Args:
        gap: the interval so far.
        similarities: of the last bases, [queue], the newest last.
        known: how many of them have been measured; below [queue] the interval stays.
        threshold: of their mean.
        factor: what the interval is multiplied by.
    """
    full = known >= len(similarities)
    return gap * factor if full and float(similarities.mean()) >= threshold else gap
