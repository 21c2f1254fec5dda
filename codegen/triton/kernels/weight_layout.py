"""Weights as the kernels read them: rows of words along K, from which a shift gives runs of neighboring columns.

A block of K is word / bits chunks of C columns; word i of a block holds column i of every chunk:

    4 bits, C = 32      16-bit word i  =  column i | 32 + i << 4 | 64 + i << 8 | 96 + i << 12    64 bytes, 128 columns
    4 bits, C = 64      byte i  =  column i | column 64 + i << 4    (word=8, for products of bytes)
    2 bits, C = 32      byte i  =  column i | .. 32 + i << 2 | 64 + i << 4 | 96 + i << 6
    3 bits, C = 16      the two low bits as above over chunks of 2C = 32 columns (32 bytes), then the high bits
                        (16 bytes, bit c is that of chunk c): 48 bytes for 128 columns

so no interleaving is needed: a mask gives C neighboring columns, for C neighboring columns of x. Words of 16 bits are
as wide as the values that they become: two of them in a register are two bfloat16 after one instruction. Codes are
stored unsigned, the middle (2^(bits-1)) being zero where there is no zero point. Scales and zero points are
[groups, N]: one load has those of all channels of a tile. The end of a ragged K is padded; x is read as zero there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.format import Format

_CHUNKS = {2: 32, 3: 16, 4: 32, 8: 64}  # the largest, by bits
_WORDS = {4: 16}  # bits of a word, where it is no byte


@dataclass(frozen=True)
class WeightLayout:
    """How codes are packed.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        chunk: columns that one shift of the packed words gives.
        group: columns that share a scale; 0 is a per-channel scale.
        word: bits of a word, 8 or 16.
    """

    bits: int
    chunk: int
    group: int
    word: int = 8

    @property
    def block(self) -> int:
        """Columns that are packed together."""
        return self.chunk * (8 if self.bits == 3 else self.word // self.bits)

    @property
    def dtype(self) -> torch.dtype:
        """Of the packed words."""
        return torch.int16 if self.word == 16 else torch.uint8

    def words(self, k: int) -> int:
        """Packed words of a row of K columns."""
        return -(-k // self.block) * self.block * self.bits // self.word


def layout_of(form: Format) -> WeightLayout | None:
    """The layout of a format's codes; None if there is no kernel for it."""
    if form.dtype not in ("int2", "int3", "int4", "int8") or form.per == "tensor" or form.k6:
        return None
    chunk = _CHUNKS[form.bits]
    while form.group % chunk:
        chunk //= 2
    if chunk < 16:
        return None
    layout = WeightLayout(form.bits, chunk, form.group, _WORDS.get(form.bits, 8))
    # A scale for a block, or for chunks of it: nothing in between.
    return layout if not form.group or form.group % layout.block == 0 or layout.block % form.group == 0 else None


def pack_weight(codes: Tensor, layout: WeightLayout) -> Tensor:
    """Unsigned codes [N, K] uint8 -> words [N, blocks x words of a block], uint8 or int16."""
    k = codes.shape[1]
    chunk, bits = layout.chunk, layout.bits
    blocks = torch.unflatten(torch.nn.functional.pad(codes, (0, -k % layout.block)), -1, (-1, layout.block))
    if bits == 3:
        low = _join_chunks(blocks & 3, 2 * chunk, 2)
        return torch.cat([low, _join_chunks(blocks >> 2, chunk, 1)], -1).flatten(1)
    return _join_chunks(blocks, chunk, bits, layout.word).flatten(1)


def _join_chunks(blocks: Tensor, chunk: int, bits: int, word: int = 8) -> Tensor:
    chunks = torch.unflatten(blocks, -1, (-1, chunk))
    shifts = bits * torch.arange(chunks.shape[-2], dtype=torch.int32, device=blocks.device)
    words = (chunks.int() << shifts[:, None]).sum(-2, dtype=torch.int32)
    return words.to(torch.uint8 if word == 8 else torch.int16)


def unpack_weight(packed: Tensor, layout: WeightLayout, k: int) -> Tensor:
    """The inverse: words -> unsigned codes [N, K] uint8."""
    chunk, bits = layout.chunk, layout.bits
    blocks = torch.unflatten(packed, -1, (-1, 3 * chunk if bits == 3 else chunk))
    if bits == 3:
        low, high = torch.split(blocks, [2 * chunk, chunk], -1)
        codes = _split_chunks(low, 2) | _split_chunks(high, 1) << 2
    else:
        codes = _split_chunks(blocks, bits, layout.word)
    return codes.flatten(1)[:, :k]


def _split_chunks(blocks: Tensor, bits: int, word: int = 8) -> Tensor:
    shifts = torch.arange(0, word, bits, dtype=torch.int32, device=blocks.device)
    return ((blocks[..., None, :].int() >> shifts[:, None]) & ((1 << bits) - 1)).flatten(-2).to(torch.uint8)


# ---- scale and zero point in one word -------------------------------------------------------------------------------


def join_scales(scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """One 32-bit word for each scale: it above, rounded to bfloat16, and below it the bfloat16 of 128 + zero point.

    A load of 32 bits that a product needs is fetched ahead by Triton's pipeline; a load of one byte is not. A zero
    point below 16 is exact; a scale is, where its format keeps it as bfloat16.

    Args:
        scale: float32 [groups, N].
        zero: uint8 [groups, N] below 2^bits; None is 2^(bits-1).
        bits: of a code, at most 4.

    Returns:
        int32 [groups, N].
    """
    points = torch.full_like(scale, 2.0 ** (bits - 1)) if zero is None else zero.float()
    low = (128.0 + points).bfloat16().view(torch.int16).int() & 0xFFFF
    return (scale.bfloat16().view(torch.int16).int() << 16) | low


def split_scales(words: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: int32 words -> scales and zero points, float32 of the same shape."""
    return (words & -65536).view(torch.float32), (words << 16).view(torch.float32) - 128.0
