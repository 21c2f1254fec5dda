"""Products of small integer codes over any number of terms, exactly: what trains a site in fixed point.

int8_matmul.py sums up to 2^17 - 1 products in int32, whatever the codes. The gradient of a weight sums over all rows of
a batch, which may be more: there blocks of rows are summed in int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.int8_matmul import MAX_K, int8_matmul

_CUDA_ROWS = 32  # _int_mm on CUDA takes more than 16 rows, and other sizes that are multiples of 8
_CUDA_MULTIPLE = 8


def code_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, exactly.

    Args:
        x: int8 [M, K], dense or transposed.
        weight: int8 [N, K], dense or transposed.

    Returns:
        [M, N] int32, or int64 where K is more than int32 is safe for.
    """
    columns = x.shape[1]
    if not x.numel() or not weight.numel():
        return torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    if columns <= MAX_K:
        return _block(x, weight)
    total = torch.zeros(len(x), len(weight), dtype=torch.int64, device=x.device)
    for first in range(0, columns, MAX_K):
        total += _block(x[:, first : first + MAX_K], weight[:, first : first + MAX_K])
    return total


def _block(x: Tensor, weight: Tensor) -> Tensor:
    if x.device.type != "cuda":
        return int8_matmul(x, weight)
    (rows, columns), others = x.shape, len(weight)
    more = -columns % _CUDA_MULTIPLE
    padded_x = torch.nn.functional.pad(x, (0, more, 0, max(0, _CUDA_ROWS - rows)))
    padded_weight = torch.nn.functional.pad(weight, (0, more, 0, -others % _CUDA_MULTIPLE))
    return int8_matmul(padded_x, padded_weight)[:rows, :others]
