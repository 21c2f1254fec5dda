"""Arguments of the operators of triton_group_op.py, checked by real and fake versions alike, as triton_op_checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.group_layout import group_layout_of
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.triton_op_checks import check_epilogue, check_row_scale, kernel_dtypes
from qcompile.ir.op_checks import OpChecks, same_size
from qcompile.numerics.format import Format


def check_linear_group(
    x: Tensor, x_scale: Tensor, packed: Tensor, words: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, act: str, columns: int, dtype: torch.dtype,
) -> WeightLayout:  # fmt: skip
    """Arguments of qcompile_triton::linear_group; returns the layout of the weight."""
    check = OpChecks("qcompile_triton::linear_group")
    check.given(x=x, x_scale=x_scale, packed=packed, words=words)
    form, of_x = check.format("format", format), check.format("act", act)
    layout = group_layout_of(form, of_x)
    if layout is None:
        check.refuse("format", format, f"int4 or fp4 that a kernel multiplies by codes of {act} in groups")
    if dtype not in kernel_dtypes(x):
        check.refuse("dtype", dtype, "bfloat16 or float16")
    check.columns(columns)
    codes = torch.float8_e4m3fn if of_x.dtype == "fp8" else torch.int8
    if not columns or x.ndim < 1 or x.dtype != codes or not same_size(x.shape[-1], columns):
        check.refuse("x", x, f"{codes} [.., K] with K = `columns` = {columns} above 0")
    padded = -(-columns // layout.block) * layout.block
    check.tensor("packed", packed, (torch.uint8,), x, f"uint8 [N, {padded // 2}] for K = {columns}", None, padded // 2)
    n, groups = packed.shape[0], -(-padded // layout.group)
    kind = torch.float32 if form.zero == "none" else torch.int64
    check.tensor("words", words, (kind,), x, f"{kind} [{groups}, {n}]", groups, n)
    if of_x.per == "group":
        shape = [*x.shape[:-1], of_x.groups(columns)]
        check.tensor("x_scale", x_scale, (torch.float32,), x, f"float32 {shape}", *shape)
    else:
        check_row_scale(check, x, x_scale)
    check_epilogue(check, x, n, bias, residual, low, up)
    return layout


def check_centered(codes: Tensor, zero: Tensor, format: str) -> Format:
    """Arguments of qcompile_triton::centered; returns the format."""
    check = OpChecks("qcompile_triton::centered")
    check.given(codes=codes, zero=zero)
    form = check.format("format", format)
    if (form.dtype, form.zero) != ("int4", "int") or form.per == "tensor" or form.dual:
        check.refuse("format", format, "int4 with integer zero points, by row or in groups")
    if codes.ndim < 1 or codes.dtype != torch.uint8 or not codes.shape[-1]:
        check.refuse("codes", codes, "uint8 [.., K] with K above 0")
    shape = [*codes.shape[:-1], form.groups(codes.shape[-1])]
    check.tensor("zero", zero, (torch.float32,), codes, f"float32 {shape}", *shape)
    return form
