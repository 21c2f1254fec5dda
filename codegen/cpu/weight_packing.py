"""Weights as the C++ products read them: blocks of 16 output channels (native/linear.h draws them).

One layout serves every number of rows and every instruction set. N is padded to a multiple of 32 with zeros, K to whole
quads (int8) or octets (4 bits) of columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK, PAIR = 16, 32
"""Channels of a block, and of the pair in which blocks are multiplied."""
MAX_DUAL_GROUP = 248
"""Columns of a group whose sum of int8 values is an int16."""


def pack_bytes(codes: Tensor) -> Tensor:
    """int8 codes [N, K] -> uint8 [N/16, K/4, 16, 4], w + 128."""
    padded = pad(codes, (0, -codes.shape[1] % 4, 0, -codes.shape[0] % PAIR)).view(torch.uint8) ^ 0x80
    return _in_blocks(padded, 4)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Unsigned codes uint8 [N, K] -> [N/16, K/8, 16, 4]: an octet's first four columns in the low nibbles."""
    padded = pad(codes, (0, -codes.shape[1] % 8, 0, -codes.shape[0] % PAIR))
    octets = torch.unflatten(padded, 1, (-1, 2, 4))
    return _in_blocks((octets[:, :, 0] | (octets[:, :, 1] << 4)).flatten(1), 4)


def pack_groups(values: Tensor) -> Tensor:
    """One value of each group, [N, G] -> [N/16, G, 16]."""
    padded = pad(values, (0, 0, 0, -values.shape[0] % PAIR))
    return torch.unflatten(padded, 0, (-1, BLOCK)).transpose(1, 2).contiguous()


def pack_group_pairs(values: Tensor) -> Tensor:
    """One value of each group, [N, G] -> [N/16, G/2, 16, 2], two groups together."""
    padded = pad(values, (0, -values.shape[1] % 2, 0, -values.shape[0] % PAIR))
    return _in_blocks(padded, 2)


def split_groups(values: Tensor, group: int, columns: int) -> tuple[Tensor, int]:
    """Values of groups [N, G] as those of smaller groups, if theirs are too wide for `dual_linear`; their width."""
    parts = next(
        p for p in range(1, group + 1) if group % p == 0 and group // p <= MAX_DUAL_GROUP and group // p % 8 == 0
    )
    width = group // parts
    return values.repeat_interleave(parts, 1)[:, : math.ceil(columns / width)], width


def _in_blocks(rows: Tensor, width: int) -> Tensor:
    """[N, C] -> [N/16, C/width, 16, width]."""
    blocks = torch.unflatten(rows, 0, (-1, BLOCK))
    return torch.unflatten(blocks, 2, (-1, width)).transpose(1, 2).contiguous()
