"""What the fakes of torch.ops.qcompile_cpu's attentions refuse, and which attentions are given to them."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.op_checks import OpChecks, same_size

MAX_QUERY_ROWS, MAX_HEAD_SIZE = 16, 256
"""Queries for a key head, and the width of a head, that the operators take."""

KeysAndValues = tuple[Tensor, Tensor]
Codes = tuple[Tensor, Tensor, Tensor]
"""uint8 codes [B, G, T, D, or D / 2 where a byte holds two], scales float16 and zero points uint8 [B, G, T, 1]."""


def takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes these: at most 16 rows for a key head, heads of whole vectors, a dtype that it reads.

    Sizes must be known; a graph may have symbolic ones that fit.
    """
    sizes = query.shape[1], query.shape[2], query.shape[3], key.shape[1], value.shape[3]
    return all(isinstance(size, int) for size in sizes) and _obstacle(query, key.shape[1], value.shape[3]) is None


def _obstacle(query: Tensor, shared: int, value_width: int) -> str | None:
    """What the operators demand and these are known not to be."""
    heads, positions, width = query.shape[1:]
    known = all(isinstance(size, int) for size in (heads, positions, shared))
    if query.dtype not in (torch.float32, torch.bfloat16):
        return "float32 or bfloat16"
    if known and (not shared or heads % shared or heads // shared * positions > MAX_QUERY_ROWS):
        return f"of up to {MAX_QUERY_ROWS} rows for a key head"
    if any(isinstance(size, int) and (size % 16 or not 0 < size <= MAX_HEAD_SIZE) for size in (width, value_width)):
        return f"of heads that are a multiple of 16, up to {MAX_HEAD_SIZE}"
    return None


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    new_key: Tensor | None,
    new_value: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Check the arguments of `attention`.

    Args:
        query: [B, H, S, D].
        key: [B, G, T, D].
        value: [B, G, T, E].
        new_key: [B, G, N, D], or None.
        new_value: [B, G, N, E], or None.
        mask: broadcasts to [B, H, S, T + N], or None.
    """
    op = OpChecks("qcompile_cpu::attention")
    _check_query(op, query)
    if (new_key is None) != (new_value is None):
        op.refuse("new_key", new_key, "given with new_value")
    parts = [("", (key, value))]
    if new_key is not None and new_value is not None:
        parts.append(("new_", (new_key, new_value)))
    for name, part in parts:
        _check_keys(op, query, name, part, key.shape[1], value.shape[3])
    _check_heads(op, query, key.shape[1], value.shape[3])
    _check_mask(op, query, mask, sum(part[0].shape[2] for _, part in parts))


def check_code_attention(
    query: Tensor,
    of_codes: tuple[Tensor | None, Tensor | None],
    first: KeysAndValues | None,
    codes: tuple[Codes, Codes],
    new: KeysAndValues,
    mask: Tensor | None,
) -> None:
    """Check the arguments of `code_attention`.

    Args:
        query: [B, H, S, D].
        of_codes: the query that codes of keys are multiplied with, float32 [B, H, S, D], and what is added to that
            product, float32 [B, H, S]; or None.
        first: float keys [B, G, F, D] and values [B, G, F, E] before the codes, or None.
        codes: of keys and of values.
        new: keys [B, G, N, D] and values [B, G, N, E] behind them.
        mask: broadcasts to [B, H, S, F + T + N], or None.
    """
    op = OpChecks("qcompile_cpu::code_attention")
    _check_query(op, query)
    (keys, _, _), _ = codes
    if keys.ndim != 4 or new[1].ndim != 4:
        op.refuse("key", keys, "uint8 [B, G, T, D] with new_value [B, G, N, E]")
    shared, value_width = keys.shape[1], new[1].shape[3]
    _check_heads(op, query, shared, value_width)
    packed = 2 if same_size(keys.shape[3] * 2, query.shape[3]) else 1
    sizes = (query.shape[0], shared, keys.shape[2])
    for name, (stored, scale, zero), width in zip(("key", "value"), codes, (query.shape[3], value_width), strict=True):
        _check_part(op, name, stored, torch.uint8, (*sizes, width // packed))
        _check_part(op, f"{name}_scale", scale, torch.float16, (*sizes, 1))
        _check_part(op, f"{name}_zero", zero, torch.uint8, (*sizes, 1))
    rotated, bias = of_codes
    if rotated is not None:
        _check_part(op, "code_query", rotated, torch.float32, tuple(query.shape))
    if bias is not None:
        _check_part(op, "code_bias", bias, torch.float32, tuple(query.shape[:3]))
    if first is not None:
        _check_keys(op, query, "first_", first, shared, value_width)
    _check_keys(op, query, "new_", new, shared, value_width)
    count = keys.shape[2] + new[0].shape[2] + (0 if first is None else first[0].shape[2])
    _check_mask(op, query, mask, count)


def _check_query(op: OpChecks, query: Tensor) -> None:
    if query.ndim != 4:
        op.refuse("query", query, "float32 or bfloat16 [B, H, S, D]")


def _check_part(op: OpChecks, name: str, part: Tensor, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    fits = part.ndim == len(sizes) and part.dtype == dtype and part.device.type == "cpu"
    if not fits or not all(map(same_size, part.shape, sizes)):
        op.refuse(name, part, f"{dtype} {list(sizes)} on the CPU")


def _check_keys(op: OpChecks, query: Tensor, name: str, part: KeysAndValues, shared: int, value_width: int) -> None:
    count = part[0].shape[2] if part[0].ndim == 4 else 0
    for kind, values, width in zip(("key", "value"), part, (query.shape[3], value_width), strict=True):
        _check_part(op, name + kind, values, query.dtype, (query.shape[0], shared, count, width))


def _check_heads(op: OpChecks, query: Tensor, shared: int, value_width: int) -> None:
    obstacle = _obstacle(query, shared, value_width)
    if obstacle is not None:
        op.refuse("query", query, obstacle)


def _check_mask(op: OpChecks, query: Tensor, mask: Tensor | None, keys: int) -> None:
    if mask is None:
        return
    whole = (*query.shape[:3], keys)
    pairs = zip(reversed(mask.shape), reversed(whole), strict=False)
    fits = mask.ndim <= 4 and all(same_size(a, 1) or same_size(a, b) for a, b in pairs)
    if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
        op.refuse("mask", mask, f"bool or float, of a shape that broadcasts to {list(whole)}")
