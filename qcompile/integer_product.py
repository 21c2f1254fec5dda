"""Sums of int8 products: exact, by what the processor at hand multiplies fast.

On a CPU, torch's `_int_mm` is fast where there are 8-bit dot products for AVX-512, or tiles of AMX; anywhere else
torch 2.13 runs one plain loop, tens of times slower than its float32 product. There integers are multiplied as
float32, a few columns at a time: every partial sum is a whole number below 2^24, so it is exact in any order.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

COLUMNS = 1024  # |sum of 1024 products of -128 .. 127| <= 2^24, up to which float32 has every whole number

Processor = Literal["amx", "vnni", "avx2", "other"]


@functools.cache
def processor() -> Processor:
    """How this CPU multiplies int8: by tiles, by dot products of AVX-512 or without both."""
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
    return add_as_float(x.float(), weight, torch.zeros(len(x), len(weight), dtype=torch.int32))


def add_as_float(x: Tensor, weight: Tensor, sums: Tensor) -> Tensor:
    """sums int32 [M, N] += x (whole numbers of int8, float32) [M, K] times weight int8 [N, K] turned; in place."""
    for first in range(0, x.shape[1], COLUMNS):
        part = slice(first, first + COLUMNS)
        sums += (x[:, part] @ weight[:, part].float().t()).int()
    return sums
