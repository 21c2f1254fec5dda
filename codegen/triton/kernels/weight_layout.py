"""Weights as the kernels read them: rows of bytes along K, from which a shift gives whole runs of columns.

A block of K is 8 / bits chunks of C columns; byte i of a block holds column i of every chunk:

    4 bits, C = 64      byte i  =  column i | column 64 + i << 4                      64 bytes for 128 columns
    2 bits, C = 32      byte i  =  column i | .. 32 + i << 2 | 64 + i << 4 | 96 + i << 6
    3 bits, C = 16      the two low bits as above over chunks of 2C = 32 columns (32 bytes), then the high bits
                        (16 bytes, bit c is that of chunk c): 48 bytes for 128 columns

so no interleaving is needed: a mask makes C columns that belong to C neighbouring columns of x. Codes are stored
unsigned, the middle (2^(bits-1)) being zero where there is no zero point. Scales and zero points are [groups, N]: one
load has those of all channels of a tile. The end of a ragged K is padded; x is read as zero there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.format import Format

_CHUNKS = {2: 32, 3: 16, 4: 64, 8: 64}  # the largest, by bits


@dataclass(frozen=True)
class WeightLayout:
    """How codes lie: bits, columns of a chunk, and columns that share a scale (0: the row)."""

    bits: int
    chunk: int
    group: int

    @property
    def block(self) -> int:
        """Columns that are packed together."""
        return self.chunk * (8 if self.bits == 3 else 8 // self.bits)


def layout_of(form: Format) -> WeightLayout | None:
    """The layout of a format's codes; None if there is no kernel for it."""
    if form.dtype not in ("int2", "int3", "int4", "int8") or form.per == "tensor":
        return None
    chunk = _CHUNKS[form.bits]
    while form.group % chunk:
        chunk //= 2
    if chunk < 16:
        return None
    found = WeightLayout(form.bits, chunk, form.group)
    # A scale for a block, or for chunks of it: nothing in between.
    return found if not form.group or form.group % found.block == 0 or found.block % form.group == 0 else None


def pack_weight(codes: Tensor, layout: WeightLayout) -> Tensor:
    """Unsigned codes [N, K] uint8 -> bytes [N, blocks x bytes of a block]."""
    k = codes.shape[1]
    c, bits = layout.chunk, layout.bits
    blocks = torch.nn.functional.pad(codes, (0, -k % layout.block)).unflatten(-1, (-1, layout.block))
    if bits == 3:
        low = _shifted(blocks & 3, 2 * c, 2)
        return torch.cat([low, _shifted(blocks >> 2, c, 1)], -1).flatten(1)
    return _shifted(blocks, c, bits).flatten(1)


def _shifted(blocks: Tensor, chunk: int, bits: int) -> Tensor:
    chunks = blocks.unflatten(-1, (-1, chunk))
    shifts = bits * torch.arange(chunks.shape[-2], dtype=torch.uint8, device=blocks.device)
    return (chunks << shifts[:, None]).sum(-2, dtype=torch.int32).to(torch.uint8)


def unpack_weight(packed: Tensor, layout: WeightLayout, k: int) -> Tensor:
    """The inverse: bytes -> unsigned codes [N, K] uint8."""
    c, bits = layout.chunk, layout.bits
    rows = packed.unflatten(-1, (-1, 3 * c if bits == 3 else c))
    if bits == 3:
        low, high = rows.split([2 * c, c], -1)
        codes = _apart(low, 2) | _apart(high, 1) << 2
    else:
        codes = _apart(rows, bits)
    return codes.flatten(1)[:, :k]


def _apart(rows: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    return ((rows[..., None, :] >> shifts[:, None]) & (2**bits - 1)).flatten(-2)
