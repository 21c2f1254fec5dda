"""Arguments of torch.ops.qcompile_triton, checked before a kernel is launched, by real and fake versions alike.

A wrong one ends in a ValueError that names the operator, the argument, its value and what is demanded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.parse_spec import parse
from qcompile.codegen.triton.kernels.render import padded
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout, layout_of
from qcompile.codegen.triton.launch.pack_weights import pairs_scales
from qcompile.codegen.triton.launch.row_quant import MAX_K
from qcompile.ir.op_checks import FLOATS, OpChecks, same_size

_CODES = (torch.int8, torch.float8_e4m3fn)


def check_linear_w(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, columns: int,
) -> WeightLayout:  # fmt: skip
    """Arguments of qcompile_triton::linear_w; returns the layout of the weight."""
    check = OpChecks("qcompile_triton::linear_w")
    check.given(x=x, packed=packed, scale=scale)
    form = check.format("format", format)
    layout = layout_of(form)
    if layout is None:
        check.refuse(
            "format", format, "one that a kernel reads: int2, int3, int4 or int8 by row or by groups of chunks"
        )
    check.columns(columns)
    if not columns or x.ndim < 1 or not same_size(x.shape[-1], columns):
        check.refuse("x", x, f"float [.., K] with K = `columns` = {columns} above 0")
    check.tensor("x", x, kernel_dtypes(x), x, "bfloat16 or float16")
    padded = -(-columns // layout.block) * layout.block
    words = layout.words(columns)
    check.tensor("packed", packed, (layout.dtype,), x, f"{layout.dtype} [N, {words}] for K = {columns}", None, words)
    n, groups = packed.shape[0], -(-padded // layout.group) if layout.group else 1
    paired = pairs_scales(form, x.dtype)
    scale_type = torch.int32 if paired else torch.float32
    check.tensor("scale", scale, (scale_type,), x, f"{scale_type} [{groups}, {n}]", groups, n)
    if paired and zero is not None:
        check.refuse("zero", zero, "None, as the words of scale have the zero points")
    if (zero is not None) != (form.zero != "none") and not paired:
        check.refuse("zero", zero, f"{'None' if zero is not None else 'given'} with format {form}")
    if zero is not None:
        dtype = torch.uint8 if form.zero == "int" else torch.float32
        check.tensor("zero", zero, (dtype,), x, f"{dtype} [{groups}, {n}]", groups, n)
    check_epilogue(check, x, n, bias, residual, low, up)
    return layout


def check_linear_a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Arguments of qcompile_triton::linear_a8."""
    check = OpChecks("qcompile_triton::linear_a8")
    check.given(x=x, x_scale=x_scale, weight=weight, scale=scale)
    if dtype not in kernel_dtypes(x):
        check.refuse("dtype", dtype, "bfloat16 or float16")
    if x.ndim < 1 or x.dtype not in _CODES or not x.shape[-1]:
        check.refuse("x", x, "int8 or float8_e4m3fn [.., K] with K above 0")
    n, k = weight.shape[0] if weight.ndim else 0, x.shape[-1]
    check.tensor("weight", weight, (x.dtype,), x, f"{x.dtype} [N, {k}]", None, k)
    check.tensor("scale", scale, (torch.float32,), x, f"float32 [{n}, 1]", n, 1)
    check_row_scale(check, x, x_scale)
    check_epilogue(check, x, n, bias, residual, low, up)


def check_linear_w4a8(
    x: Tensor, x_scale: Tensor, packed: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, low: Tensor | None, up: Tensor | None, format: str, columns: int, dtype: torch.dtype,
) -> WeightLayout:  # fmt: skip
    """Arguments of qcompile_triton::linear_w4a8; returns the layout of the weight."""
    check = OpChecks("qcompile_triton::linear_w4a8")
    check.given(x=x, x_scale=x_scale, packed=packed, steps=steps, scale=scale)
    layout = byte_layout_of(check.format("format", format))
    if layout is None:
        check.refuse("format", format, "int4 per channel, or with two-level scales in groups of 32, 64, 128, 256, ..")
    if dtype not in kernel_dtypes(x):
        check.refuse("dtype", dtype, "bfloat16 or float16")
    check.columns(columns)
    if not columns or x.ndim < 1 or x.dtype != torch.int8 or not same_size(x.shape[-1], columns):
        check.refuse("x", x, f"int8 [.., K] with K = `columns` = {columns} above 0")
    padded = -(-columns // layout.block) * layout.block
    check.tensor("packed", packed, (torch.uint8,), x, f"uint8 [N, {padded // 2}] for K = {columns}", None, padded // 2)
    n, groups = packed.shape[0], -(-padded // layout.group) if layout.group else 1
    check.tensor("steps", steps, (torch.int32,), x, f"int32 [{groups}, {n}]", groups, n)
    check.tensor("scale", scale, (torch.float32,), x, f"float32 [{n}, 1]", n, 1)
    check_row_scale(check, x, x_scale)
    check_epilogue(check, x, n, bias, residual, low, up)
    return layout


def check_row_quant(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, gain: Tensor | None, shift: Tensor | None,
    smooth: Tensor | None, signs: Tensor | None, left: Tensor | None, right: Tensor | None, spec: str,
) -> RowQuant:  # fmt: skip
    """Arguments of qcompile_triton::row_quant; returns the spec."""
    check = OpChecks("qcompile_triton::row_quant")
    check.given(x=x)
    try:
        fields = parse(spec)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{check.op}: spec is {spec!r}: {error}") from None
    if not isinstance(fields, RowQuant):
        check.refuse("spec", spec, "one of row_quant")
    if x.ndim < 1 or x.dtype not in kernel_dtypes(x) or not 0 < x.shape[-1] <= MAX_K:
        check.refuse("x", x, f"bfloat16 or float16 [.., K] with K up to {MAX_K}")
    k = x.shape[-1]
    if fields.hadamard and not same_size(k, fields.hadamard):
        check.refuse("x", x, f"[.., {fields.hadamard}], as the transform of {spec}")
    sides = padded(fields.left), fields.right
    needs = {
        "residual": (residual, fields.residual, x.shape), "gate": (gate, fields.first == "gate", x.shape),
        "gain": (gain, fields.first in ("rms", "layer"), (k,)), "shift": (shift, fields.first == "layer", (k,)),
        "smooth": (smooth, fields.smooth, (k,)), "signs": (signs, bool(fields.hadamard), (k,)),
        "left": (left, bool(fields.hadamard), sides[:1] * 2), "right": (right, bool(fields.hadamard), sides[1:] * 2),
    }  # fmt: skip
    for name, (tensor, needed, shape) in needs.items():
        if (tensor is not None) != needed:
            check.refuse(name, tensor, f"{'given' if needed else 'None'} with {spec}")
        if tensor is not None:
            check.tensor(name, tensor, FLOATS, x, f"float {list(shape)}", *shape)
    return fields


def check_row_scale(check: OpChecks, x: Tensor, x_scale: Tensor) -> None:
    """Scales of the codes x [.., K]: one a row, or one."""
    if x_scale.numel() == 1:
        check.tensor("x_scale", x_scale, (torch.float32,), x, "float32")
    else:
        check.tensor("x_scale", x_scale, (torch.float32,), x, "float32 of one value, or [.., 1]", *x.shape[:-1], 1)


def kernel_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes of x and of results: those of the kernels on a GPU, any float where plain torch stands for them."""
    return tuple(NAMES) if x.is_cuda else FLOATS


def check_epilogue(
    check: OpChecks, x: Tensor, n: int, bias: Tensor | None, residual: Tensor | None, low: Tensor | None,
    up: Tensor | None,
) -> None:  # fmt: skip
    """What is added to the product [.., N]: bias [N], residual [.., N], low [.., R] @ up [N, R]^T."""
    if bias is not None:
        check.tensor("bias", bias, FLOATS, x, f"float [{n}]", n)
    if residual is not None:
        check.tensor("residual", residual, FLOATS, x, f"float {[*x.shape[:-1], n]}", *x.shape[:-1], n)
    if (low is None) != (up is None):
        check.refuse("low", low, f"{'given' if low is None else 'None'}, as up is {'given' if low is None else 'None'}")
    if low is not None and up is not None:
        rank = up.shape[-1] if up.ndim else 0
        check.tensor("up", up, FLOATS, x, f"float [{n}, R]", n, None)
        check.tensor("low", low, FLOATS, x, f"float {[*x.shape[:-1], rank]}", *x.shape[:-1], rank)
