"""int8 matmul with exact int32 sums, by whatever the processor at hand multiplies fast.

On a CPU, torch's `_int_mm` is fast where there are 8-bit dot products of AVX-512 (VNNI), or AMX tiles; anywhere else
torch 2.13 runs one plain loop, tens of times slower than its float32 matmul. There integers are multiplied as
float32, a block of columns at a time: every partial sum is an integer below 2^24, so it is exact in any order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

MAX_K = 2**17 - 1  # the most products of -128 .. 127 whose sum is an int32 whatever the codes
BLOCK_K = 1024  # |sum of 1024 products of -128 .. 127| <= 2^24, up to which float32 represents every integer

Processor = Literal["amx", "vnni", "avx2", "other"]

Workspace = Callable[[str, int, int, torch.dtype], Tensor]
"""workspace(name, rows, columns, dtype): uninitialized CPU memory [rows, columns], one buffer for each name."""


@functools.cache
def processor() -> Processor:
    """What torch multiplies int8 with on this CPU: AMX tiles, AVX-512 dot products, or (AVX2, other) neither."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_int8"):
        return "amx"
    return "vnni" if capabilities.get("avx512_vnni") else "avx2" if capabilities.get("avx2") else "other"


def has_fast_int8_matmul() -> bool:
    """Whether `_int_mm` is fast on this CPU."""
    return processor() in ("amx", "vnni")


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, exactly.

    Args:
        x: int8 [M, K].
        weight: int8 [N, K], on the same device.

    Returns:
        int32 [M, N].

    Raises:
        ValueError: the two do not fit each other, or K > MAX_K.
    """
    if not (x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1] <= MAX_K):
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: an int8 matmul needs [M, K] and [N, K] "
            f"with one K up to {MAX_K}, where int32 sums are exact"
        )
    if not (x.dtype == weight.dtype == torch.int8 and x.device == weight.device):
        raise ValueError(
            f"x is {x.dtype} on {x.device} and weight {weight.dtype} on {weight.device}: an int8 matmul needs int8 "
            "codes on one device"
        )
    if x.shape[1] == 1:  # torch's CPU _int_mm misreads the strides of a lone column
        return x.int() * weight.t().int()
    if x.device.type != "cpu" or has_fast_int8_matmul():
        dense = x.reshape(-1).view(x.shape)  # it misreads the stride of a lone row too
        return torch._int_mm(dense, weight.t())
    return int8_matmul_as_float(x.float(), weight, x.new_empty(len(x), len(weight), dtype=torch.int32))


def _allocate(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="cpu")


def int8_matmul_as_float(x: Tensor, weight: Tensor, out: Tensor, workspace: Workspace = _allocate) -> Tensor:
    """out = x @ weight.T, exactly, by float32 matmuls of BLOCK_K columns.

    Args:
        x: int8 values as float32 [M, K].
        weight: int8 [N, K].
        out: int32 [M, N], written in place.
        workspace: buffers that may be reused from call to call.

    Returns:
        out.
    """
    (m, k), n = x.shape, len(weight)
    if not k:
        return out.zero_()
    product, converted = workspace("product", m, n, torch.float32), workspace("converted", m, n, torch.int32)
    for first in range(0, k, BLOCK_K):
        block = slice(first, min(first + BLOCK_K, k))
        wide = workspace("weight", n, block.stop - first, torch.float32).copy_(weight[:, block])
        torch.mm(x[:, block], wide.t(), out=product)  # float32 under autocast too, which leaves given outputs alone
        if first:
            out += converted.copy_(product)
        else:
            out.copy_(product)
    return out
