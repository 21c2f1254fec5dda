"""Weights as the kernels read them: rows of bytes along K, from which a shift gives runs of neighboring columns.

A block of K is 8 / bits chunks of C columns; byte i of a block holds column i of every chunk:

    4 bits, C = 64      byte i  =  column i | column 64 + i << 4                      64 bytes for 128 columns
    2 bits, C = 32      byte i  =  column i | .. 32 + i << 2 | 64 + i << 4 | 96 + i << 6
    3 bits, C = 16      the two low bits as above over chunks of 2C = 32 columns (32 bytes), then the high bits
                        (16 bytes, bit c is that of chunk c): 48 bytes for 128 columns

so no interleaving is needed: a mask gives C neighboring columns, for C neighboring columns of x. Codes are stored
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
    """How codes are packed.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        chunk: columns that one shift of the packed bytes gives.
        group: columns that share a scale; 0 is a per-channel scale.
    """

    bits: int
    chunk: int
    group: int

    @property
    def block(self) -> int:
        """Columns that are packed together."""
        return self.chunk * (8 if self.bits == 3 else 8 // self.bits)


def layout_of(form: Format) -> WeightLayout | None:
    """The layout of a format's codes; None if there is no kernel for it."""
    if form.dtype not in ("int2", "int3", "int4", "int8") or form.per == "tensor" or form.k6:
        return None
    chunk = _CHUNKS[form.bits]
    while form.group % chunk:
        chunk //= 2
    if chunk < 16:
        return None
    layout = WeightLayout(form.bits, chunk, form.group)
    # A scale for a block, or for chunks of it: nothing in between.
    return layout if not form.group or form.group % layout.block == 0 or layout.block % form.group == 0 else None


def pack_weight(codes: Tensor, layout: WeightLayout) -> Tensor:
    """Unsigned codes [N, K] uint8 -> bytes [N, blocks x bytes of a block]."""
    k = codes.shape[1]
    chunk, bits = layout.chunk, layout.bits
    blocks = torch.unflatten(torch.nn.functional.pad(codes, (0, -k % layout.block)), -1, (-1, layout.block))
    if bits == 3:
        low = _join_chunks(blocks & 3, 2 * chunk, 2)
        return torch.cat([low, _join_chunks(blocks >> 2, chunk, 1)], -1).flatten(1)
    return _join_chunks(blocks, chunk, bits).flatten(1)


def _join_chunks(blocks: Tensor, chunk: int, bits: int) -> Tensor:
    chunks = torch.unflatten(blocks, -1, (-1, chunk))
    shifts = bits * torch.arange(chunks.shape[-2], dtype=torch.uint8, device=blocks.device)
    return (chunks << shifts[:, None]).sum(-2, dtype=torch.int32).to(torch.uint8)


def unpack_weight(packed: Tensor, layout: WeightLayout, k: int) -> Tensor:
    """The inverse: bytes -> unsigned codes [N, K] uint8."""
    chunk, bits = layout.chunk, layout.bits
    blocks = torch.unflatten(packed, -1, (-1, 3 * chunk if bits == 3 else chunk))
    if bits == 3:
        low, high = torch.split(blocks, [2 * chunk, chunk], -1)
        codes = _split_chunks(low, 2) | _split_chunks(high, 1) << 2
    else:
        codes = _split_chunks(blocks, bits)
    return codes.flatten(1)[:, :k]


def _split_chunks(blocks: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=blocks.device)
    return ((blocks[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)).flatten(-2)
