"""Arguments of the operators of experts, checked by real and fake versions alike, as triton_op_checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.kernel_support import ROW_BYTES
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, layout_of
from qcompile.codegen.triton.launch.pack_weights import pairs_scales
from qcompile.codegen.triton.triton_op_checks import kernel_dtypes
from qcompile.ir.op_checks import OpChecks, same_size

_INTEGERS = (torch.int32, torch.int64)
MAX_EXPERTS = 4095  # ends that one program holds


def check_experts_w(
    x: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, format: str,
    columns: int,
) -> WeightLayout:  # fmt: skip
    """Arguments of qcompile_triton::experts_w; returns the layout of the stack."""
    check = OpChecks("qcompile_triton::experts_w")
    check.given(x=x, ends=ends, packed=packed, scale=scale)
    form = check.format("format", format)
    layout = layout_of(form)
    if layout is None:
        check.refuse(
            "format", format, "one that a kernel reads: int2, int3, int4 or int8 by row or by groups of chunks"
        )
    check.columns(columns)
    if not columns or x.ndim != 2 or not same_size(x.shape[-1], columns):
        check.refuse("x", x, f"float [T, K] with K = `columns` = {columns} above 0")
    check.tensor("x", x, kernel_dtypes(x), x, "bfloat16 or float16")
    experts = _check_rows(check, x, rows, ends)
    padded = -(-columns // layout.block) * layout.block
    words = layout.words(columns)
    check.tensor("packed", packed, (layout.dtype,), x, f"{layout.dtype} [E N, {words}] for K = {columns}", None, words)
    n, groups = packed.shape[0], -(-padded // layout.group) if layout.group else 1
    if n % experts:
        check.refuse("packed", packed, f"the same number of channels for each of the {experts} experts")
    paired = pairs_scales(form, x.dtype)
    kind = torch.int32 if paired else torch.float32
    check.tensor("scale", scale, (kind,), x, f"{kind} [{groups}, {n}]", groups, n)
    has_zero = form.zero != "none" and not paired
    if (zero is not None) != has_zero:
        check.refuse("zero", zero, f"{'given' if has_zero else 'None'} with format {form} and x in {x.dtype}")
    if zero is not None:
        points = torch.uint8 if form.zero == "int" else torch.float32
        check.tensor("zero", zero, (points,), x, f"{points} [{groups}, {n}]", groups, n)
    return layout


def check_experts_a8(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> None:
    """Arguments of qcompile_triton::experts_a8."""
    check = OpChecks("qcompile_triton::experts_a8")
    check.given(x=x, x_scale=x_scale, ends=ends, weight=weight, scale=scale)
    _check_codes(check, x, x_scale, (torch.int8, torch.float8_e4m3fn), dtype)
    experts = _check_rows(check, x, rows, ends)
    k = x.shape[1]
    check.tensor("weight", weight, (x.dtype,), x, f"{x.dtype} [{experts}, N, {k}]", experts, None, k)
    n = weight.shape[1]
    check.tensor("scale", scale, (torch.float32,), x, f"float32 [{experts}, {n}, 1]", experts, n, 1)


def check_experts_w4a8(
    x: Tensor, x_scale: Tensor, rows: Tensor | None, ends: Tensor, packed: Tensor, steps: Tensor, scale: Tensor,
    format: str, columns: int, dtype: torch.dtype,
) -> WeightLayout:  # fmt: skip
    """Arguments of qcompile_triton::experts_w4a8; returns the layout of the stack."""
    check = OpChecks("qcompile_triton::experts_w4a8")
    check.given(x=x, x_scale=x_scale, ends=ends, packed=packed, steps=steps, scale=scale)
    layout = byte_layout_of(check.format("format", format))
    if layout is None:
        check.refuse("format", format, "int4 per channel, or with two-level scales in groups of 32, 64, 128, 256, ..")
    check.columns(columns)
    _check_codes(check, x, x_scale, (torch.int8,), dtype)
    if not same_size(x.shape[1], columns):
        check.refuse("x", x, f"int8 [T, K] with K = `columns` = {columns}")
    experts = _check_rows(check, x, rows, ends)
    padded = -(-columns // layout.block) * layout.block
    demand = f"uint8 [E N, {padded // 2}] for K = {columns}"
    check.tensor("packed", packed, (torch.uint8,), x, demand, None, padded // 2)
    n, groups = packed.shape[0], -(-padded // layout.group) if layout.group else 1
    if n % experts:
        check.refuse("packed", packed, f"the same number of channels for each of the {experts} experts")
    check.tensor("steps", steps, (torch.int32,), x, f"int32 [{groups}, {n}]", groups, n)
    check.tensor("scale", scale, (torch.float32,), x, f"float32 [{n}, 1]", n, 1)
    return layout


def _check_rows(check: OpChecks, x: Tensor, rows: Tensor | None, ends: Tensor) -> int:
    """Which rows of x there are, and where those of each expert end; returns the number of experts."""
    if rows is not None:
        check.tensor("rows", rows, _INTEGERS, x, "int32 or int64 [S]", None)
    check.tensor("ends", ends, _INTEGERS, x, "int32 or int64 [E]", None)
    experts = ends.shape[0]
    if not 0 < experts <= MAX_EXPERTS:
        check.refuse("ends", ends, f"of 1 to {MAX_EXPERTS} experts")
    return experts


def _check_codes(
    check: OpChecks, x: Tensor, x_scale: Tensor, dtypes: tuple[torch.dtype, ...], dtype: torch.dtype
) -> None:
    """Rows of codes x [T, K] with a scale each, and the dtype of the result."""
    if dtype not in kernel_dtypes(x):
        check.refuse("dtype", dtype, "bfloat16 or float16")
    if x.ndim != 2 or x.dtype not in dtypes or not x.shape[1] or x.shape[1] % ROW_BYTES:
        names = " or ".join(str(each).removeprefix("torch.") for each in dtypes)
        check.refuse("x", x, f"{names} [T, K], K a multiple of {ROW_BYTES}")
    check.tensor("x_scale", x_scale, (torch.float32,), x, f"float32 [{x.shape[0]}, 1]", x.shape[0], 1)
