"""The kernels of a quantized cache in static buffers, registered for the operators of ir/static_cache_ops.py.

Attention that kv_decode does not take (queries in another dtype than bfloat16, more positions than `MAX_POSITIONS`) is
computed by the definition in plain torch, on the same device; heads of widths that kv_write does not take are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.launch.kv_attention import KVBuffers, attend, read_tokens, write_tokens
from qcompile.ir.op_checks import OpChecks
from qcompile.ir.static_cache_checks import check_buffers, check_kv_attend, check_kv_write
from qcompile.ir.static_cache_ops import attend_in_torch, kv_attend, kv_read, kv_write, read_in_torch
from qcompile.numerics.kv_words import WIDTHS

MAX_POSITIONS = 16
"""Positions of a query that kv_decode takes: with more, a product over dequantized keys reads less for each."""


def has_kv_kernel(width: int, positions: int, dtype: torch.dtype) -> bool:
    """Whether kv_decode computes the attention of a query [.., positions, width]."""
    return width in WIDTHS and 0 < positions <= MAX_POSITIONS and dtype == torch.bfloat16


def kv_write_by_kernel(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor,
    length: Tensor, bits: int,
) -> None:  # fmt: skip
    """qcompile::kv_write on a GPU."""
    check_kv_write(new_keys, new_values, keys, key_scales, values, value_scales, length, bits)
    cache = KVBuffers(keys, key_scales, values, value_scales, length, bits)
    if cache.width not in WIDTHS or new_keys.dtype == torch.float64:
        demand = f"bfloat16, float16 or float32 [.., D] with D one of {WIDTHS} on a GPU"
        OpChecks("qcompile::kv_write").refuse("new_keys", new_keys, demand)
    write_tokens(cache, new_keys, new_values)


def kv_read_by_kernel(
    keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """qcompile::kv_read on a GPU."""
    check_buffers("qcompile::kv_read", keys, key_scales, values, value_scales, bits).float_dtype("dtype", dtype)
    if values.shape[3] not in WIDTHS or dtype == torch.float64:
        return read_in_torch(keys, key_scales, values, value_scales, bits, dtype)
    return read_tokens(KVBuffers(keys, key_scales, values, value_scales, keys, bits), dtype)


def kv_attend_by_kernel(
    query: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, length: Tensor,
    mask: Tensor | None, scale: float, bits: int,
) -> Tensor:  # fmt: skip
    """qcompile::kv_attend on a GPU."""
    check_kv_attend(query, keys, key_scales, values, value_scales, length, mask, bits)
    if has_kv_kernel(values.shape[3], query.shape[2], query.dtype):
        return attend(query, KVBuffers(keys, key_scales, values, value_scales, length, bits), scale, mask=mask)
    return attend_in_torch(query, keys, key_scales, values, value_scales, length, mask, scale, bits)


if torch.version.hip is None:  # the kernels hold instructions of NVIDIA's GPUs; elsewhere the definitions run
    kv_write.register_kernel("cuda")(kv_write_by_kernel)
    kv_read.register_kernel("cuda")(kv_read_by_kernel)
    kv_attend.register_kernel("cuda")(kv_attend_by_kernel)
