"""Bit streams of codes as little-endian 32-bit words: what GPUs' checkpoint formats are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.bit_packing import pack, unpack
from qcompile.numerics.format import Format


def words(stream: Tensor) -> Tensor:
    """uint8 [.., bytes] -> int32 [.., ceil(bytes / 4)], padded with zero bits."""
    padded = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 4))
    return torch.unflatten(padded.flatten().view(torch.int32), 0, (*padded.shape[:-1], -1))


def pack_words(unsigned: Tensor, bits: int) -> Tensor:
    """Unsigned codes [.., K] -> int32 [.., ceil(K bits / 32)]: element k in bits k b .. of its row's stream."""
    return words(pack(unsigned, bits))


def unsigned_stream(stored: Tensor, form: Format) -> Tensor:
    """Stored codes of an integer format -> uint8 [N, ceil(K bits / 8)], every code offset to be unsigned."""
    if form.bits < 8 or form.qmin == 0:
        return stored
    return (stored.to(torch.int16) - form.qmin).to(torch.uint8)


def unsigned_codes(stored: Tensor, form: Format, columns: int) -> Tensor:
    """Stored codes of an integer format -> unsigned codes uint8 [N, K]."""
    return unpack(unsigned_stream(stored, form), form.bits, columns)
