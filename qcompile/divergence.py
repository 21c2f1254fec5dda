"""KL(float || quantized) of logits: what training lowers and sensitivity ranks by."""

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
