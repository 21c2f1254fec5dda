"""Fake quantization in training: x -> dequantize(quantize(x)), whose gradient is that of the identity.

Source: Bengio et al. 2013, arXiv:1308.3432 (the straight-through estimator).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Format) -> Tensor:
        return quantize_tensor(x, format).dequantize(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


_apply: Callable[[Tensor, Format], Tensor] = _FakeQuantize.apply  # untyped in torch


def fake_quantize_ste(x: Tensor, format: Format) -> Tensor:
    """Quantize and dequantize x [.., K] in its dtype; the gradient passes straight through."""
    return _apply(x, format)
