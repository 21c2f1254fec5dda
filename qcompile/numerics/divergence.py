"""Distances of outputs from a reference's: what training minimizes, and what searches and sensitivity rank by."""

from __future__ import annotations

import torch
from torch import Tensor

_TOKENS = 512  # compared at once: float32 log-probabilities of a large vocabulary take much memory


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(reference || logits) over all tokens, in nats; differentiable.

    Args:
        reference: logits [.., V] of the reference model.
        logits: logits [.., V] of the same tokens.

    Returns:
        A float32 scalar.
    """
    total, tokens = torch.zeros(()), reference.numel() // reference.shape[-1]
    chunks = zip(
        torch.split(reference.flatten(0, -2), _TOKENS), torch.split(logits.flatten(0, -2), _TOKENS), strict=True
    )
    for p, q in chunks:
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total / tokens


def relative_squared_error(reference: Tensor, output: Tensor) -> Tensor:
    """|output - reference|^2 / |reference|^2, a float32 scalar."""
    return (output - reference).float().square().sum() / reference.float().square().sum().clamp_min(1e-30)
