"""qcompile_triton::experts_a8 and experts_w4a8, products of rows of 8-bit codes and stacks of experts.

As experts_w (triton_experts_op.py): on CUDA the kernel, on a CPU its own definition in plain torch, whose integer sums
are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.decided_calls import decided, dense, on_device
from qcompile.codegen.triton.define_op import TritonOp
from qcompile.codegen.triton.kernels.w4a8_layout import int8_values
from qcompile.codegen.triton.kernels.weight_layout import unpack_weight
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.launch.quantized_experts import plan_experts_a8, plan_experts_w4a8
from qcompile.codegen.triton.triton_experts_checks import check_experts_a8, check_experts_w4a8
from qcompile.codegen.triton.triton_experts_op import product_by_expert


@TritonOp
def experts_a8(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rows of codes, sorted by expert, times the codes of each row's expert, with both scales; rounded once.

    Args:
        x: [T, K] int8 or fp8.
        x_scale: float32 [T, 1].
        rows: int32 or int64 [S]: row i of the product is row rows[i] of x; None is all rows of x in their order.
        ends: int32 or int64 [E], one past the last row of each expert, rising.
        weight: [E, N, K] of x's dtype.
        scale: float32 [E, N, 1].
        dtype: of the result.

    Returns:
        [S, N]; rows beyond the last end are zero.
    """

    def decide() -> tuple[GemmPlan | None, int]:
        check_experts_a8(x, x_scale, rows, ends, weight, scale, dtype)
        return plan_experts_a8(x, rows, ends, weight.shape[1], dtype), weight.shape[1]

    tensors = dense(x, rows, ends, weight, scale, None, x_scale, None)
    plan, channels = decided(tensors, ("experts_a8", dtype), decide)
    return _launched(x, tensors, plan, channels, dtype)


@experts_a8.on_cpu
def _(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    check_experts_a8(x, x_scale, rows, ends, weight, scale, dtype)
    return _scaled_products(x, x_scale, rows, ends, weight, scale).to(dtype)


@experts_a8.on_fake
def _(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    check_experts_a8(x, x_scale, rows, ends, weight, scale, dtype)
    return x.new_empty((x if rows is None else rows).shape[0], weight.shape[1], dtype=dtype)


@TritonOp
def experts_w4a8(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, steps: Tensor, scale: Tensor,
    format: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same of int8 rows and the integers of 4-bit codes.

    Args:
        x: [T, K] int8.
        x_scale: as of experts_a8, and so are rows and ends.
        rows: see there.
        ends: see there.
        packed: of the stack as one weight [E N, K], as prepare_experts_w4a8 makes it.
        steps: int32 words of the groups, as prepare_experts_w4a8 makes them.
        scale: per channel [E N, 1], as prepare_experts_w4a8 makes it.
        format: of the codes: int4 with two-level scales, or per channel.
        columns: K.
        dtype: of the result.

    Returns:
        [S, N]; rows beyond the last end are zero.
    """

    def decide() -> tuple[GemmPlan | None, int]:
        layout = check_experts_w4a8(x, x_scale, rows, ends, packed, steps, scale, format, columns, dtype)
        channels = len(packed) // len(ends)
        return plan_experts_w4a8(x, rows, ends, channels, layout, dtype), channels

    tensors = dense(x, rows, ends, packed, scale, None, x_scale, steps)
    plan, channels = decided(tensors, ("experts_w4a8", format, columns, dtype), decide)
    return _launched(x, tensors, plan, channels, dtype)


@experts_w4a8.on_cpu
def _(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, steps: Tensor, scale: Tensor,
    format: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    layout = check_experts_w4a8(x, x_scale, rows, ends, packed, steps, scale, format, columns, dtype)
    integers = int8_values(unpack_weight(packed, layout, columns), steps, layout)
    stack, scales = (part.unflatten(0, (len(ends), -1)) for part in (integers, scale))
    return _scaled_products(x, x_scale, rows, ends, stack, scales).to(dtype)


@experts_w4a8.on_fake
def _(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, steps: Tensor, scale: Tensor,
    format: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_experts_w4a8(x, x_scale, rows, ends, packed, steps, scale, format, columns, dtype)
    return x.new_empty((x if rows is None else rows).shape[0], packed.shape[0] // ends.shape[0], dtype=dtype)


def _launched(
    x: Tensor, tensors: tuple[Tensor | None, ...], plan: GemmPlan | None, channels: int, dtype: torch.dtype
) -> Tensor:
    rows = tensors[1]
    out = x.new_empty(len(x if rows is None else rows), channels, dtype=dtype)
    if plan is None:
        return out
    with on_device(x):
        return plan.run(tensors, out, len(out), channels)


def _scaled_products(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, stack: Tensor, scale: Tensor
) -> Tensor:
    """Exact sums, as float32 holds int32, times the scale of the row, then that of the channel: the kernel's order."""
    source, steps = (part if rows is None else part[rows] for part in (x, x_scale))
    sums = product_by_expert(source.double(), ends, stack.double()).float()
    of_row = torch.bucketize(torch.arange(len(source), device=x.device), ends.long(), right=True)
    known = of_row < len(ends)  # else a row of no expert, which is zero whatever its scale is
    scales = scale.squeeze(-1)[of_row.clamp(max=len(ends) - 1)]
    return torch.where(known[:, None], sums * steps * scales, 0.0)
