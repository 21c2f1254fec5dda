"""Blocks of calibration batches whose tokens are multiplied together.

x^T x of a site's input costs a pass over [K, K] for every product, so short batches are joined. Which are joined
depends on all batches only: processes that have whole blocks each sum the same products as one process does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

_LEAST, _MOST = 256, 4096
_BLOCKS = 16  # at least, where there are tokens for it: that many processes can share them


def token_blocks(batches: Sequence[Sequence[Any]]) -> list[int]:
    """How many batches each block has, in order.

    Args:
        batches: flat inputs, the first two dimensions of which are sequences and positions.
    """
    tokens = [max((_positions(t) for t in batch if isinstance(t, Tensor)), default=0) for batch in batches]
    enough = max(_LEAST, min(_MOST, sum(tokens) // _BLOCKS))
    sizes, total = [0], 0
    for count in tokens:
        if total >= enough:
            sizes.append(0)
            total = 0
        sizes[-1] += 1
        total += count
    return sizes if batches else []


def _positions(tensor: Tensor) -> int:
    return tensor.shape[:2].numel() if tensor.ndim else 0
