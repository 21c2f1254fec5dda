"""A quantized KV cache in static buffers, as operators: write new tokens, read all, attend to all.

The buffers are those of numerics/kv_words.py; `length` counts the tokens in them and is a tensor, so that no operator
waits for a GPU, and one graph serves every length. The versions here are the definitions, in plain torch on any device.
On NVIDIA GPUs codegen/triton/triton_kv_ops.py registers kernels for the same operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.static_cache_checks import check_buffers, check_kv_attend, check_kv_write
from qcompile.numerics.kv_words import (
    PAGE,
    dequantize_words,
    key_codes,
    key_words,
    quantize_states,
    scale_words,
    value_codes,
    value_words,
)

_WRITTEN = ("keys", "key_scales", "values", "value_scales")


@torch.library.custom_op("qcompile::kv_write", mutates_args=_WRITTEN)
def kv_write(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor,
    length: Tensor, bits: int,
) -> None:  # fmt: skip
    """Quantize new tokens into the buffers, behind the `length` tokens that are there; `length` stays.

    Tokens beyond the capacity are not written, and attention gives NaN from then on.

    Args:
        new_keys: float [B, H, N, D].
        new_values: float [B, H, N, D].
        keys: int16 [B, H, T, words], written.
        key_scales: int32 [B, H, T], written.
        values: int16 [B, H, T / 64, D, words], written.
        value_scales: int32 [B, H, T], written.
        length: int64 [].
        bits: of a code, 4 or 8.
    """
    check_kv_write(new_keys, new_values, keys, key_scales, values, value_scales, length, bits)
    start = int(length)
    end = min(start + new_keys.shape[2], keys.shape[2])
    if end <= start:
        return
    codes, scale, zero = quantize_states(new_keys[:, :, : end - start], bits)
    keys[:, :, start:end] = key_words(codes, bits)
    key_scales[:, :, start:end] = scale_words(scale, zero, bits)
    codes, scale, zero = quantize_states(new_values[:, :, : end - start], bits)
    value_scales[:, :, start:end] = scale_words(scale, zero, bits)
    first, last = start // PAGE, -(-end // PAGE)
    pages = value_codes(values[:, :, first:last], bits)
    pages[:, :, start - first * PAGE : end - first * PAGE] = codes
    values[:, :, first:last] = value_words(pages, bits)


@kv_write.register_fake
def _(
    new_keys: Tensor, new_values: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor,
    length: Tensor, bits: int,
) -> None:  # fmt: skip
    check_kv_write(new_keys, new_values, keys, key_scales, values, value_scales, length, bits)


@torch.library.custom_op("qcompile::kv_read", mutates_args=())
def kv_read(
    keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All keys and values [B, H, T, D], dequantized; what is behind the last token has no meaning, but is finite."""
    check_buffers("qcompile::kv_read", keys, key_scales, values, value_scales, bits).float_dtype("dtype", dtype)
    return read_in_torch(keys, key_scales, values, value_scales, bits, dtype)


def read_in_torch(
    keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition of kv_read."""
    both = (key_codes(keys, bits), key_scales), (value_codes(values, bits), value_scales)
    read_keys, read_values = (dequantize_words(codes, words, bits).to(dtype) for codes, words in both)
    return read_keys, read_values


@kv_read.register_fake
def _(
    keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    check_buffers("qcompile::kv_read", keys, key_scales, values, value_scales, bits).float_dtype("dtype", dtype)
    shape = *keys.shape[:3], values.shape[3]
    return keys.new_empty(shape, dtype=dtype), keys.new_empty(shape, dtype=dtype)


@torch.library.custom_op("qcompile::kv_attend", mutates_args=())
def kv_attend(
    query: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, length: Tensor,
    mask: Tensor | None, scale: float, bits: int,
) -> Tensor:  # fmt: skip
    """softmax(q K^T scale + mask) V of the last N positions of a cache.

    Args:
        query: float [B, G H, N, D], whose heads share the H heads of keys, G one after another.
        keys: int16 [B, H, T, words].
        key_scales: int32 [B, H, T].
        values: int16 [B, H, T / 64, D, words].
        value_scales: int32 [B, H, T].
        length: int64 [], tokens in the buffers, the N last ones of which are those of the query.
        mask: float32 [B, N, T]; None: each position sees the tokens up to its own.
        scale: of the scores.
        bits: of a code, 4 or 8.

    Returns:
        [B, G H, N, D] in the query's dtype.
    """
    check_kv_attend(query, keys, key_scales, values, value_scales, length, mask, bits)
    return attend_in_torch(query, keys, key_scales, values, value_scales, length, mask, scale, bits)


def attend_in_torch(
    query: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, length: Tensor,
    mask: Tensor | None, scale: float, bits: int,
) -> Tensor:  # fmt: skip
    """The definition of kv_attend, in float32."""
    positions, tokens = query.shape[2], torch.arange(keys.shape[2], device=keys.device)
    both = (key_codes(keys, bits), key_scales), (value_codes(values, bits), value_scales)
    groups = query.shape[1] // (keys.shape[1] or 1)
    all_keys, all_values = (dequantize_words(*part, bits).repeat_interleave(groups, 1) for part in both)
    scores = query.float() @ all_keys.transpose(-1, -2) * scale
    last = length - positions + torch.arange(positions, device=keys.device)[:, None]
    if mask is not None:
        scores, last = scores + mask[:, None], length - 1
    out = scores.masked_fill(tokens > last, float("-inf")).softmax(-1) @ all_values
    return torch.where(length > keys.shape[2], float("nan"), out).to(query.dtype)


@kv_attend.register_fake
def _(
    query: Tensor, keys: Tensor, key_scales: Tensor, values: Tensor, value_scales: Tensor, length: Tensor,
    mask: Tensor | None, scale: float, bits: int,
) -> Tensor:  # fmt: skip
    check_kv_attend(query, keys, key_scales, values, value_scales, length, mask, bits)
    return torch.empty_like(query, memory_format=torch.contiguous_format)
