"""Arguments of the operators of a quantized cache in static buffers, checked by real and fake versions alike."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.op_checks import FLOATS, OpChecks, same_size
from qcompile.numerics.kv_words import PAGE, TRIP


def check_buffers(
    op: str, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, bits: int
) -> OpChecks:
    """The buffers of a cache, as kv_words.py draws them; returns the checks for further arguments."""
    check = OpChecks(op)
    if bits not in (4, 8):
        check.refuse("bits", bits, "4 or 8")
    tokens = keys.shape[2] if keys.ndim == 4 else 0
    if keys.ndim != 4 or keys.dtype != torch.int16 or not same_size(tokens % TRIP, 0):
        check.refuse("keys", keys, f"int16 [B, H, T, words] with T a multiple of {TRIP}")
    batch, heads, _, words = keys.shape
    width, page_words = words * 16 // bits, PAGE * bits // 16
    shape = batch, heads, tokens // PAGE, width, page_words
    check.tensor("values", values, (torch.int16,), keys, f"int16 {list(shape)}", *shape)
    for name, scales in (("key_scales", key_scales), ("value_scales", value_scales)):
        check.tensor(name, scales, (torch.int32,), keys, f"int32 {[batch, heads, tokens]}", batch, heads, tokens)
    named = dict(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)
    for name, buffer in named.items():
        if not buffer.is_contiguous():
            check.refuse(name, buffer, f"contiguous, but has strides {buffer.stride()}")
    return check


def check_kv_write(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor,
    length: Tensor, bits: int,
) -> None:  # fmt: skip
    """Arguments of qcompile::kv_write."""
    check = check_buffers("qcompile::kv_write", keys, key_scales, values, value_scales, bits)
    batch, heads, width = keys.shape[0], keys.shape[1], values.shape[3]
    demand = f"float [{batch}, {heads}, N, {width}]"
    check.tensor("new_keys", new_keys, FLOATS, keys, demand, batch, heads, None, width)
    check.tensor("new_values", new_values, (new_keys.dtype,), keys, f"as new_keys, {new_keys.dtype} "
                 f"{list(new_keys.shape)}", *new_keys.shape)  # fmt: skip
    _check_length(check, length, keys)


def check_kv_attend(
    query: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, length: Tensor,
    mask: Tensor | None, bits: int,
) -> None:  # fmt: skip
    """Arguments of qcompile::kv_attend."""
    check = check_buffers("qcompile::kv_attend", keys, key_scales, values, value_scales, bits)
    batch, heads, tokens, width = *keys.shape[:3], values.shape[3]
    demand = f"float [{batch}, a multiple of {heads}, N, {width}]"
    check.tensor("query", query, FLOATS, keys, demand, batch, None, None, width)
    if query.shape[1] % (heads or 1):
        check.refuse("query", query, demand)
    if mask is not None:
        sizes = batch, query.shape[2], tokens
        check.tensor("mask", mask, (torch.float32,), keys, f"float32 {list(sizes)}", *sizes)
    _check_length(check, length, keys)


def _check_length(check: OpChecks, length: Tensor, keys: Tensor) -> None:
    if length.dtype != torch.int64 or length.numel() != 1 or length.device != keys.device:
        check.refuse("length", length, f"int64 of one value on {keys.device}")
