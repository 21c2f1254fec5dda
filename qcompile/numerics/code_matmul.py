"""Products of small integer codes over any number of terms, exactly: what trains a site in fixed point.

int8_matmul.py sums up to 2^17 - 1 products in int32, whatever the codes. The gradient of a weight sums over all rows of
a batch, which may be more: there blocks of rows are summed in int64.

On CUDA `_int_mm` is cuBLAS, which takes more than 16 rows of x and multiples of 8 of the other sizes. So codes are
padded with zeros, which add nothing; and both sides are dense along the terms, in which order cuBLAS is fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.numerics.int8_matmul import MAX_K, int8_matmul

_CUDA_ROWS = 32
_CUDA_MULTIPLE = 8


def code_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, exactly.

    Args:
        x: int8 [M, K], dense or transposed.
        weight: int8 [N, K], dense or transposed.

    Returns:
        [M, N] int32, or int64 where K is more than int32 is safe for.
    """
    if not x.numel() or not weight.numel():
        return torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    (multiply, most), columns = matmul_on(x.device.type), x.shape[1]
    if columns <= most:
        return multiply(x, weight)
    total = torch.zeros(len(x), len(weight), dtype=torch.int64, device=x.device)
    for first in range(0, columns, most):
        total += multiply(x[:, first : first + most], weight[:, first : first + most])
    return total


def matmul_on(device_type: str) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """What multiplies on a type of device, and the most columns that it sums in int32."""
    if device_type == "cuda":
        return cuda_matmul, MAX_K - MAX_K % _CUDA_MULTIPLE  # which may be padded up to a multiple
    return int8_matmul, MAX_K


def cuda_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in int32 by cuBLAS, whatever the sizes and strides.

    Args:
        x: int8 [M, K], K up to MAX_K rounded down to a multiple of 8.
        weight: int8 [N, K].
    """
    (rows, columns), others = x.shape, len(weight)
    wide = columns + -columns % _CUDA_MULTIPLE
    padded_x = _padded(x, max(rows, _CUDA_ROWS), wide)
    padded_weight = _padded(weight, others + -others % _CUDA_MULTIPLE, wide)
    return int8_matmul(padded_x, padded_weight)[:rows, :others]


def _padded(codes: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix, dense by rows, with zeros behind it up to a size."""
    if codes.shape != (rows, columns):  # else a copy
        codes = torch.nn.functional.pad(codes, (0, columns - codes.shape[1], 0, rows - len(codes)))
    return codes.contiguous()
