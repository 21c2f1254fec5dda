"""How far outputs are from the float model's: what training lowers, and searches and sensitivity rank by."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(want: Tensor, got: Tensor) -> Tensor:
    """Mean KL(want || got) over all tokens of logits [.., V], nats; differentiable, in pieces of 512 tokens."""
    total, tokens = torch.zeros(()), want.numel() // want.shape[-1]
    for p, q in zip(want.flatten(0, -2).split(512), got.flatten(0, -2).split(512), strict=True):
        a, b = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total = total + (a.exp() * (a - b)).sum()
    return total / tokens


def squared_error(want: Tensor, got: Tensor) -> Tensor:
    """|got - want|^2 / |want|^2."""
    return (got - want).float().square().sum() / want.float().square().sum().clamp_min(1e-30)
