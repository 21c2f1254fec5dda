"""Arguments of qcompile_triton::experts_w, checked by real and fake versions alike, as triton_op_checks.py."""

from __future__ import annotations

import torch
from torch import Tensor

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
    if rows is not None:
        check.tensor("rows", rows, _INTEGERS, x, "int32 or int64 [S]", None)
    check.tensor("ends", ends, _INTEGERS, x, "int32 or int64 [E]", None)
    experts = ends.shape[0]
    if not 0 < experts <= MAX_EXPERTS:
        check.refuse("ends", ends, f"of 1 to {MAX_EXPERTS} experts")
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
