"""What the fakes of torch.ops.qcompile_cpu refuse: what the C++ refuses too, before a graph is compiled.

A wrong argument ends in a ValueError that names the operator, the argument, its value and what is demanded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.cpu.weight_packing import BLOCK, MAX_DUAL_GROUP, PAIR
from qcompile.ir.op_checks import OpChecks, same_size
from qcompile.numerics.int8_matmul import MAX_K

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


def check_gelu_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Check the argument of `gelu_codes`.

    Args:
        x: float32 or bfloat16 [.., K].

    Returns:
        Empty tensors: int8 [.., K] and float32 [.., 1].

    Raises:
        ValueError: another dtype, or no dimension.
    """
    if not x.ndim or x.dtype not in (torch.float32, torch.bfloat16):
        OpChecks("qcompile_cpu::gelu_codes").refuse("x", x, "float32 or bfloat16 [.., K]")
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
