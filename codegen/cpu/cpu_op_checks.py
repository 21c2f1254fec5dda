"""What the fakes of torch.ops.qcompile_cpu refuse: what the C++ refuses too, before a graph is compiled.

A wrong argument ends in a ValueError that names the operator, the argument, its value and what is demanded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.cpu.weight_packing import BLOCK, MAX_DUAL_GROUP, PAIR
from qcompile.ir.op_checks import OpChecks, same_size
from qcompile.numerics.int8_matmul import MAX_K

MAX_QUERY_ROWS, MAX_HEAD_SIZE = 16, 256
"""Queries for a key head, and the width of a head, that `attention` takes."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_linear(
    name: str,
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    of_channels: tuple[Tensor | None, Tensor | None],
    n: int,
    dtype: torch.dtype,
    group: int = 0,
    of_groups: tuple[Tensor | None, Tensor | None] = (None, None),
    offset: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Check the arguments of an operator.

    Args:
        name: of the operator.
        x: [.., K].
        x_scale: of int8 rows, or None.
        codes: packed; nibbles where there are groups.
        of_channels: scale and bias, each float32 with N values or None.
        n: N.
        dtype: of the result.
        group: columns of a group; 0: none.
        of_groups: step and zero, each [N/16, G, 16] or None.
        offset: of two-level scales, [N/16, G/2, 16, 2], or None.
        table: [16], or None.

    Returns:
        An empty tensor [.., N] of the dtype.
    """
    op = OpChecks(f"qcompile_cpu::{name}")
    if not x.ndim:
        op.refuse("x", x, "[.., K]")
    k, takes_codes = x.shape[-1], name in ("int8_linear", "dual_linear", "group_linear")
    if not 0 <= k <= MAX_K:
        op.refuse("x", x, f"[.., K] with K up to {MAX_K}, where int32 sums are exact")
    if x.dtype == torch.int8 and takes_codes and x_scale is not None:
        fits = x_scale.ndim in (0, x.ndim) and all(map(same_size, x_scale.shape, (*x.shape[:-1], 1)))
        if x_scale.dtype != torch.float32 or not fits:
            op.refuse("x_scale", x_scale, "float32, one for each row of x, or []")
    elif x.dtype not in _FLOATS or x_scale is not None:
        op.refuse("x", x, "int8 with x_scale, or float without" if takes_codes else "float")
    if dtype not in _FLOATS:
        op.refuse("dtype", dtype, "float32, bfloat16 or float16")
    if n < 0:
        op.refuse("n", n, "0 or more")
    blocks = -(-n // PAIR) * 2
    _check_groups(op, name, blocks, k, group, of_groups, offset)
    depth = -(-k // (8 if group else 4))
    if codes.dtype != torch.uint8 or tuple(codes.shape) != (blocks, depth, BLOCK, 4):
        op.refuse("codes", codes, f"uint8 [{blocks}, {depth}, {BLOCK}, 4] for N = {n} and K = {k}")
    for part, values in zip(("scale", "bias"), of_channels, strict=True):
        if values is not None and (values.dtype != torch.float32 or values.numel() != n):
            op.refuse(part, values, f"float32, one for each of {n} channels")
    if table is not None and (table.dtype != torch.float32 or tuple(table.shape) != (16,)):
        op.refuse("table", table, "float32 [16]")
    for other in (x_scale, codes, *of_channels, *of_groups, offset, table):
        if other is not None and other.device != x.device:
            op.refuse("one tensor", other, f"on {x.device}, as x is")
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _check_groups(
    op: OpChecks,
    name: str,
    blocks: int,
    k: int,
    group: int,
    of_groups: tuple[Tensor | None, Tensor | None],
    offset: Tensor | None,
) -> None:
    """Step, zero point and offset of groups."""
    if of_groups[0] is None:
        return
    most = MAX_DUAL_GROUP if name == "dual_linear" else 2**62
    if not 0 < group <= most or group % 8:
        op.refuse("group", group, f"a multiple of 8, up to {most}")
    groups = -(-(-(-k // 8) * 8) // group)
    dtypes = (torch.uint8,) if name == "dual_linear" else (torch.uint8, torch.float32)
    for part, values in zip(("step", "zero"), of_groups, strict=True):
        if values is not None and (values.dtype not in dtypes or tuple(values.shape) != (blocks, groups, BLOCK)):
            op.refuse(part, values, f"{' or '.join(str(d) for d in dtypes)} [{blocks}, {groups}, {BLOCK}]")
    if offset is not None:
        pairs = -(-groups // 2)
        if offset.dtype != torch.uint8 or tuple(offset.shape) != (blocks, pairs, BLOCK, 2):
            op.refuse("offset", offset, f"uint8 [{blocks}, {pairs}, {BLOCK}, 2]")


def takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes these: at most 16 rows for a key head, heads of whole vectors, a dtype that it reads.

    Sizes must be known; a graph may have symbolic ones that fit.
    """
    sizes = query.shape[1], query.shape[2], query.shape[3], key.shape[1], value.shape[3]
    return all(isinstance(size, int) for size in sizes) and _obstacle(query, key, value) is None


def _obstacle(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """What `attention` demands and these are known not to be."""
    heads, positions, width, shared, value_width = *query.shape[1:], key.shape[1], value.shape[3]
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
    if query.ndim != 4:
        op.refuse("query", query, "float32 or bfloat16 [B, H, S, D]")
    if (new_key is None) != (new_value is None):
        op.refuse("new_key", new_key, "given with new_value")
    parts = {"key": key, "value": value} | ({} if new_key is None else {"new_key": new_key, "new_value": new_value})
    for name, part in parts.items():
        assert part is not None
        count = (key if name in ("key", "value") else new_key).shape[2]  # type: ignore[union-attr]
        width = query.shape[3] if name.endswith("key") else value.shape[3]
        same = part.ndim == 4 and part.dtype == query.dtype and part.device == query.device
        sizes = (query.shape[0], key.shape[1], count, width)
        if not same or not all(map(same_size, part.shape, sizes)):
            op.refuse(name, part, f"{list(sizes)} of query's dtype and device")
    obstacle = _obstacle(query, key, value)
    if obstacle is not None:
        op.refuse("query", query, obstacle)
    if mask is not None:
        keys = key.shape[2] + (0 if new_key is None else new_key.shape[2])
        whole = (query.shape[0], query.shape[1], query.shape[2], keys)
        pairs = zip(reversed(mask.shape), reversed(whole), strict=False)
        fits = mask.ndim <= 4 and all(same_size(a, 1) or same_size(a, b) for a, b in pairs)
        if not fits or not (mask.dtype == torch.bool or mask.is_floating_point()):
            op.refuse("mask", mask, f"bool or float, of a shape that broadcasts to {list(whole)}")
