"""Rounding in training: x -> dq(q(x)), whose gradient passes as if nothing had been rounded.

Source: Bengio et al. 2013, arXiv:1308.3432 (the straight-through estimator).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, form: Format) -> Tensor:
        return quantize_tensor(x, form).dequantize(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize_ste(x: Tensor, form: Format) -> Tensor:
    """The numbers that x [.., K] is rounded to, in its dtype; the gradient is that of the identity."""
    out: Tensor = _Round.apply(x, form)
    return out
