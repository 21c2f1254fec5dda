"""Packing: codes of 2, 3 or 4 bits as a little-endian bit stream along K.

Each row of [N, K] is one stream, padded with zero bits to a whole byte. Four bits:

    byte 0          byte 1          byte 2
    |k=1 |k=0 |     |k=3 |k=2 |     |k=5 |k=4 |        high nibble | low nibble

which is the layout that ONNX Runtime's MatMulNBits reads. Three bits put k=0 in bits 0..2 of byte
0, k=1 in bits 3..5, k=2 in bits 6..7 of byte 0 and bit 0 of byte 1, and so on. Eight bits are bytes.
Signed codes are stored offset by 2^(bits-1), so that every stored code is unsigned.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [.., K] below 2^bits -> uint8 [.., ceil(K bits / 8)]."""
    if bits == 8:
        return codes.to(torch.uint8)
    codes = codes.to(torch.uint8)
    k = codes.shape[-1]
    if bits == 4:
        if k % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    stream = (codes[..., None] >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
    stream = stream.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8))
    place_values = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (torch.unflatten(stream, -1, (-1, 8)) * place_values).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: uint8 [.., ceil(K bits / 8)] -> unsigned codes uint8 [.., K], K = columns.

    Raises:
        ValueError: rows of another number of bytes.
    """
    if packed.ndim < 1 or packed.shape[-1] != packed_columns(columns, bits):
        raise ValueError(
            f"packed codes have shape {tuple(packed.shape)}: a row of {columns} codes of {bits} bits is "
            f"{packed_columns(columns, bits)} bytes. Fix: give the packed codes and the columns of one weight"
        )
    if bits == 8:
        return packed
    if bits == 4:
        both = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
        return both[..., :columns]
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[..., None] >> shifts) & 1).flatten(-2)[..., : columns * bits]
    place_values = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (torch.unflatten(stream, -1, (columns, bits)) * place_values).sum(-1).to(torch.uint8)


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of one packed row of `columns` codes."""
    return (columns * bits + 7) // 8
