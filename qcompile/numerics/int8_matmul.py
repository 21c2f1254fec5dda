"""Sums of int8 products: exact, by what the processor at hand multiplies fast.

On a CPU, torch's `_int_mm` is fast where there are 8-bit dot products for AVX-512, or tiles of AMX; anywhere else
torch 2.13 runs one plain loop, tens of times slower than its float32 product. There integers are multiplied as
float32, a few columns at a time: every partial sum is a whole number below 2^24, so it is exact in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

COLUMNS = 1024  # |sum of 1024 products of -128 .. 127| <= 2^24, up to which float32 has every whole number

Processor = Literal["amx", "vnni", "avx2", "other"]
Room = Callable[[str, int, int, torch.dtype], Tensor]


@functools.cache
def processor() -> Processor:
    """What torch multiplies int8 with on this CPU: tiles, dot products of AVX-512, or (AVX2, other) neither."""
    can = torch.cpu.get_capabilities()
    if can.get("amx_int8"):
        return "amx"
    return "vnni" if can.get("avx512_vnni") else "avx2" if can.get("avx2") else "other"


def multiplies_int8() -> bool:
    """Whether `_int_mm` is fast on this CPU."""
    return processor() in ("amx", "vnni")


def int8_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 [M, K] times weight int8 [N, K] turned: exact sums, int32 [M, N]."""
    if x.shape[1] == 1:  # torch's CPU _int_mm misreads the strides of a lone column
        return x.int() * weight.t().int()
    if x.device.type != "cpu" or multiplies_int8():
        rows = x.reshape(-1).view(x.shape)  # dense: it misreads the stride of a lone row too
        return torch._int_mm(rows, weight.t())
    return sum_as_float(x.float(), weight, x.new_empty(len(x), len(weight), dtype=torch.int32))


def _fresh(what: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cpu")


def sum_as_float(x: Tensor, weight: Tensor, sums: Tensor, room: Room = _fresh) -> Tensor:
    """sums int32 [M, N] = x (whole numbers of int8, as float32) [M, K] times weight int8 [N, K] turned; in place.

    room: uninitialised memory [rows, columns] of a dtype, one for each name.
    """
    (m, k), n = x.shape, len(weight)
    product, more = room("product", m, n, torch.float32), room("more", m, n, torch.int32)
    with torch.autocast("cpu", enabled=False):  # which would round the product to 16 bits
        for first in range(0, k, COLUMNS):
            part = slice(first, min(first + COLUMNS, k))
            wide = room("wide", n, part.stop - first, torch.float32).copy_(weight[:, part])
            torch.mm(x[:, part], wide.t(), out=product)
            if first:
                sums += more.copy_(product)
            else:
                sums.copy_(product)
    return sums
