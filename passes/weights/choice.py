"""What an algorithm that reads the second moments of a site's input finds for a weight, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.memory.stored_tensor import loaded
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

_SAMPLE = 128  # rows of a weight that damage is measured on


@dataclass(frozen=True)
class Choice:
    """What an algorithm chose for a weight.

    Attributes:
        codes: the quantized weight.
        fell_back: whether it is rounded to nearest because the Hessian is singular.
    """

    codes: QTensor
    fell_back: bool = False


Choose = Callable[[Tensor, Tensor, Format], Choice]
"""weight [N, K] float32 (sites on one input, stacked), Hessian [K, K] float64, format -> codes."""


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights [N_i, K] as one, [sum N_i, K] float32; of those that lie in files one is read at a time."""
    whole = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=torch.float32)
    for rows, weight in zip(whole.split([len(w) for w in weights]), weights, strict=True):
        rows.copy_(loaded(weight))
    return whole


def damage(weight: Tensor, hessian: Tensor, codes: QTensor) -> tuple[float, float]:
    """||(W - W^) x||^2 / ||W x||^2 over the calibration tokens, rounded to nearest and as chosen.

    Measured on rows at even distances, as many as a sample needs.

    Args:
        weight: W [N, K].
        hessian: sum x x^T, [K, K].
        codes: W^.
    """
    step = -(-len(weight) // _SAMPLE)
    w, h = weight[::step].float(), hessian.float()
    pieces = codes.split([len(rows) for rows in weight.split(step)])
    chosen = torch.cat([piece.split([1, len(piece.codes) - 1])[0].dequantize().float() for piece in pieces])
    nearest = quantize_tensor(w, codes.format).dequantize().float()

    def size(error: Tensor) -> float:
        return float(((error @ h) * error).sum())

    whole = max(size(w), 1e-30)
    return size(w - nearest) / whole, size(w - chosen) / whole
