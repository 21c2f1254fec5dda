"""What the fake of torch.ops.qcompile_cpu.short_attention refuses: what the C++ refuses too."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.op_checks import OpChecks, same_size

MAX_WIDTH = 256
"""The widest head that the operator takes; widths are multiples of 8."""


def takes_short_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `short_attention` takes these, at any size: batch, queries and keys may be symbolic."""
    if query.ndim != 4 or key.ndim != 4 or value.ndim != 4:
        return False
    sizes = query.shape[1], query.shape[3], key.shape[1], value.shape[3]
    same = all(part.dtype == query.dtype and part.device == query.device for part in (key, value))
    known = all(isinstance(size, int) for size in sizes) and key.shape[1] == value.shape[1]
    return same and known and _obstacle(query, key, value) is None


def _obstacle(query: Tensor, key: Tensor, value: Tensor) -> tuple[str, Tensor, str] | None:
    """The argument that is known not to be what the operator demands, and what that is."""
    if query.dtype not in (torch.float32, torch.bfloat16):
        return "query", query, "float32 or bfloat16 [B, H, S, D]"
    heads, shared = query.shape[1], key.shape[1]
    if isinstance(heads, int) and isinstance(shared, int) and (not shared or heads % shared):
        return "key", key, "[B, G, T, D] with H a multiple of G"
    for name, part in (("key", key), ("value", value)):
        width = part.shape[3]
        if isinstance(width, int) and (width % 8 or not 0 < width <= MAX_WIDTH):
            return name, part, f"of heads that are a multiple of 8, up to {MAX_WIDTH}"
    if isinstance(key.shape[2], int) and not key.shape[2]:
        return "key", key, "of at least one position"
    return None


def check_short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Check the arguments of `short_attention`.

    Args:
        query: [B, H, S, D].
        key: [B, G, T, D], H a multiple of G.
        value: [B, G, T, E].
        mask: broadcasts to [B, H, S, T], or None: added to scores, or which keys to see.

    Returns:
        An empty tensor [B, H, S, E] of query's dtype, whose memory is [B, S, H, E].

    Raises:
        ValueError: names the argument, what it is and what it must be.
    """
    op = OpChecks("qcompile_cpu::short_attention")
    for name, part in (("query", query), ("key", key), ("value", value)):
        if part.ndim != 4:
            op.refuse(name, part, "of four dimensions")
    batch, heads, positions, width = query.shape
    shared, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    obstacle = _obstacle(query, key, value)
    if obstacle is not None:
        op.refuse(*obstacle)
    for name, part, last in (("key", key, width), ("value", value, value_width)):
        same = part.dtype == query.dtype and part.device == query.device
        if not same or not all(map(same_size, part.shape, (batch, shared, keys, last))):
            op.refuse(name, part, f"{[batch, shared, keys, last]} of query's dtype and device")
    if mask is not None:
        whole = (batch, heads, positions, keys)
        pairs = zip(reversed(mask.shape), reversed(whole), strict=False)
        fits = mask.ndim <= 4 and all(same_size(a, 1) or same_size(a, b) for a, b in pairs)
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            op.refuse("mask", mask, f"bool or float, of a shape that broadcasts to {list(whole)}")
    return query.new_empty((batch, positions, heads, value_width)).transpose(1, 2)
