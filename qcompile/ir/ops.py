"""The dialect: `torch.ops.qcompile.*`, functional ops with a plain-torch reference each.

The reference is the meaning, the oracle of every test and what runs where no target has lowered the
graph. Formats travel as text (see format.py), so that a graph can be read, exported and saved. Gradients are in
op_gradients.py.

    quantize(x, act)                          -> codes, scale, zero      an activation, dynamically
    fake_quantize(x, act)                     -> dq(quantize(x))         with a gradient, for fine-tuning
    dequantize(codes, scale, zero, ...)       -> float
    hadamard(x, signs)                        -> x diag(signs) H / sqrt(n)
    qlinear(x, x_scale, x_zero, weight, ...)  -> dq(x) @ dq(weight).T + bias
    qexperts(x, x_scale, x_zero, ends, ...)   -> rows of each expert @ dq(its weight).T
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir import op_gradients
from qcompile.ir.op_checks import (
    check_dequantize,
    check_ends,
    check_hadamard,
    check_qexperts,
    check_qlinear,
    check_quantize,
)
from qcompile.numerics.hadamard import apply_hadamard
from qcompile.numerics.qtensor import dequantize_codes, unpack_codes
from qcompile.numerics.quantized_product import quantized_product
from qcompile.numerics.rounding import quantize_tensor


@torch.library.custom_op("qcompile::quantize", mutates_args=())
def quantize(x: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize an activation [.., K] to codes of the same shape, scale and zero (empty if none)."""
    # Contiguous results whatever x is, as the fake says: kernels and views rely on it.
    # On a GPU asking whether values are finite would wait for it at every call; NaN stays NaN there.
    result = quantize_tensor(x.contiguous(), check_quantize(x, format), check=not x.is_cuda)
    zero = x.new_empty(0, dtype=torch.float32) if result.zero is None else result.zero.float()
    return result.codes, result.scale, zero


@quantize.register_fake
def _(x: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    form = check_quantize(x, format)
    shape = () if form.per == "tensor" else (*x.shape[:-1], form.groups(x.shape[-1]))
    scale = x.new_empty(shape, dtype=torch.float32)
    zero = x.new_empty(shape if form.zero != "none" else (0,), dtype=torch.float32)
    return torch.empty_like(x, dtype=form.code_dtype).contiguous(), scale, zero


quantize.register_autograd(op_gradients.quantize_gradient)


@torch.library.custom_op("qcompile::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, format: str) -> Tensor:
    """dequantize(quantize(x)) in the dtype of x [.., K]; its gradient is that of the identity."""
    return quantize_tensor(x.contiguous(), check_quantize(x, format), check=not x.is_cuda).dequantize(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, format: str) -> Tensor:
    check_quantize(x, format)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


fake_quantize.register_autograd(op_gradients.straight_through)


@torch.library.custom_op("qcompile::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Codes -> dequantized values; `columns` > 0 says that the codes are stored packed with K = columns."""
    form = check_dequantize(codes, scale, zero, group_scale, format, columns, dtype)
    unpacked = unpack_codes(codes, form, columns) if columns else codes
    return dequantize_codes(unpacked, scale, zero, group_scale, form).to(dtype).clone()


@dequantize.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    format: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    check_dequantize(codes, scale, zero, group_scale, format, columns, dtype)
    shape = (*codes.shape[:-1], columns) if columns else codes.shape
    return codes.new_empty(shape, dtype=dtype)


@torch.library.custom_op("qcompile::hadamard", mutates_args=())
def hadamard(x: Tensor, signs: Tensor) -> Tensor:
    """x [.., n] -> x diag(signs) H_n / sqrt(n), computed in at least float32."""
    check_hadamard(x, signs)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return apply_hadamard(wide, signs.to(wide.dtype)).to(x.dtype).contiguous().clone()


@hadamard.register_fake
def _(x: Tensor, signs: Tensor) -> Tensor:
    check_hadamard(x, signs)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


hadamard.register_autograd(op_gradients.hadamard_gradient, setup_context=op_gradients.keep_signs)


@torch.library.custom_op("qcompile::qlinear", mutates_args=())
def qlinear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    act: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """dq(x) @ dq(weight).T + bias, accumulated in float32 (or exactly in int32), cast once.

    Args:
        x: [.., K]; float when `act` is "", else codes in the format `act`.
        x_scale: scale of the codes, or None.
        x_zero: their zero point, or None.
        weight: stored codes of [N, K] (see bit_packing.py).
        scale: of the weight, as in QTensor; so are zero and group_scale.
        zero: its zero point, or None.
        group_scale: its second-level scale, or None.
        bias: [N], or None.
        format: of the weight.
        act: the format of x, or "".
        columns: K.
        dtype: of the result.

    Returns:
        [.., N].
    """
    form = check_qlinear(x, x_scale, x_zero, weight, scale, zero, group_scale, bias, format, act, columns, dtype)
    out = quantized_product(x, x_scale, x_zero, (weight, scale, zero, group_scale), form, act, columns, dtype)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.to(dtype)


@qlinear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    act: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    check_qlinear(x, x_scale, x_zero, weight, scale, zero, group_scale, bias, format, act, columns, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


qlinear.register_autograd(op_gradients.qlinear_gradient, setup_context=op_gradients.keep_qlinear)


@torch.library.custom_op("qcompile::qexperts", mutates_args=())
def qexperts(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    format: str,
    act: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows sorted by expert times each one's weight, as qlinear multiplies them; only experts that have rows are read.

    Args:
        x: [S, K]; float when `act` is "", else codes in the format `act`.
        x_scale: scale of the codes, or None.
        x_zero: their zero point, or None.
        ends: [E] one past the last row of each expert, rising.
        weight: stored codes of [E, N, K].
        scale: of the weight, as in QTensor with a leading E, or one for all experts; so are zero and group_scale.
        zero: its zero point, or None.
        group_scale: its second-level scale, or None.
        format: of the weight.
        act: the format of x, or "".
        columns: K.
        dtype: of the result.

    Returns:
        [S, N]; rows beyond the last end are zero.
    """
    form = check_qexperts(x, x_scale, x_zero, ends, weight, scale, zero, group_scale, format, act, columns, dtype)
    lasts = ends.tolist()
    check_ends(lasts, x.shape[0])
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=dtype, device=x.device)
    start = 0
    for expert, end in enumerate(lasts):
        if end > start:
            rows = slice(start, end)
            part_scale, part_zero = (_part(t, rows) for t in (x_scale, x_zero))
            own_scale, own_zero, own_group_scale = (_part(t, expert) for t in (scale, zero, group_scale))
            assert own_scale is not None
            stored = weight[expert], own_scale, own_zero, own_group_scale
            out[rows] = quantized_product(x[rows], part_scale, part_zero, stored, form, act, columns, dtype).to(dtype)
            start = end
    return out


def _part(tensor: Tensor | None, own: slice | int) -> Tensor | None:
    """What some rows, or one expert, have of a tensor; a single value is shared by all."""
    return tensor if tensor is None or not tensor.ndim else tensor[own]


@qexperts.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    ends: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    format: str,
    act: str,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    check_qexperts(x, x_scale, x_zero, ends, weight, scale, zero, group_scale, format, act, columns, dtype)
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=dtype)


qexperts.register_autograd(op_gradients.qexperts_gradient, setup_context=op_gradients.keep_qexperts)
