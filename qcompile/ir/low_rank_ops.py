"""qcompile::low_rank_linear: a product with a weight that is trained through a low-rank parameter that is zero.

    y = x (W + sigma L P)^T + b,  L = 0        W: stored codes, or float       (numerics/low_rank.py has L and P)
    dx = g W,  dL = g^T (x P^T) or (g P^T)^T x,  db = sum of g over rows

L is zero whenever the product is computed, so it is omitted; what an optimizer adds to L is folded into W behind each
step (modules/low_rank_linear.py). dL is GaLore's projected gradient: sigma scales the step, not the gradient. The full
gradient g^T x exists only where a new basis is due.

The state of the basis is tensors that the backward changes in place (see projected_gradient_op.py).

Source: Q-GaLore (arXiv:2407.08296); projecting before the product is exact, (g^T x) P^T = g^T (x P^T).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import qcompile.ir.projected_gradient_op  # noqa: F401  registers project_gradient
from qcompile.ir.op_checks import FLOATS, OpChecks
from qcompile.numerics.format import Format
from qcompile.numerics.low_rank import is_left
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.whole_tensor import is_zero

NOT_FOLDED = (
    "the optimizer stepped without a fold, so its step is not in the weights: wrap it with "
    "qcompile.optim.fold_after(optimizer), or use qcompile.optim.QGaLoreAdamW8bit"
)


def check_folded(low: Tensor) -> None:
    """Refuse a low-rank parameter that is not zero.

    Raises:
        ValueError: an optimizer changed it, and nobody folded the change into the weight. (On a GPU a RuntimeError,
            from the device, so that nothing waits for it.)
    """
    if low.device.type != "cpu":
        torch._assert_async(~low.any(), NOT_FOLDED)
    elif not is_zero(low):
        raise ValueError(NOT_FOLDED)


@torch.library.custom_op("qcompile::low_rank_linear", mutates_args=())
def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    low: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    basis_scale: Tensor | None,
    basis_zero: Tensor | None,
    first: Tensor,
    similarities: Tensor,
    schedule: Tensor,
    format: str,
    basis_format: str,
    threshold: float,
    factor: int,
    dtype: torch.dtype,
) -> Tensor:
    """x dq(weight)^T + bias, with a gradient for the low-rank parameter.

    Args:
        x: float [.., K].
        weight: stored codes of [N, K], or the float weight where `format` is "".
        scale: as in QTensor; None of a float weight.
        zero: its zero point, or None.
        low: L, zeros: [N, r], or [r, K] where N < K.
        bias: [N], or None.
        basis: P [r, K], or [r, N] where N < K: stored codes, or floats where `basis_format` is "".
        basis_scale: as in QTensor, or None.
        basis_zero: its zero point, or None.
        first: [K] or [N], the first vector of the last basis, before it was quantized.
        similarities: [queue] float32, of the last bases, the newest last.
        schedule: int64 [4], see projected_gradient_op.py.
        format: of the weight, or "".
        basis_format: of the basis, or "".
        threshold: mean of the similarities from which on the interval is multiplied.
        factor: by this.
        dtype: of the product and its result.

    Returns:
        [.., N].

    Raises:
        ValueError: arguments that do not fit; L is not zero.
    """
    form = check_low_rank_linear(x, weight, scale, zero, low, bias, basis, schedule, format, dtype)
    check_folded(low)
    values = _weight(weight, scale, zero, form, x.shape[-1], dtype)
    # Not nn.functional.linear, whose result is a view: models that change it in place would be refused by autograd.
    out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    rows, flat = x.reshape(-1, x.shape[-1]).to(dtype), out.view(-1, weight.shape[0])
    if bias is None:
        torch.mm(rows, values.t(), out=flat)
    else:
        torch.addmm(bias.to(dtype), rows, values.t(), out=flat)
    return out


@low_rank_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    low: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    basis_scale: Tensor | None,
    basis_zero: Tensor | None,
    first: Tensor,
    similarities: Tensor,
    schedule: Tensor,
    format: str,
    basis_format: str,
    threshold: float,
    factor: int,
    dtype: torch.dtype,
) -> Tensor:
    check_low_rank_linear(x, weight, scale, zero, low, bias, basis, schedule, format, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saved are x and the weight. The state is no saved tensor: a module that is called twice changes it in between."""
    x, weight, scale, zero, low, bias, *state = inputs
    ctx.save_for_backward(x, weight, scale, zero)
    ctx.state, ctx.low_dtype = state, low.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, None, None, None, dL, db, None, ...) for g [.., N]."""
    x, weight, scale, zero = ctx.saved_tensors
    *state, format, basis_format, threshold, factor, dtype = ctx.state
    dx = dlow = db = None
    rows = gradient.reshape(-1, gradient.shape[-1])
    if ctx.needs_input_grad[0]:
        values = weight.to(dtype)
        if format:
            values = torch.ops.qcompile.dequantize(weight, scale, zero, None, format, x.shape[-1], dtype)
        dx = (gradient @ values).to(x.dtype)
    if ctx.needs_input_grad[4]:
        inputs = x.reshape(-1, x.shape[-1]).to(dtype)
        dlow = torch.ops.qcompile.project_gradient(inputs, rows, *state, basis_format, threshold, factor, ctx.low_dtype)
    if ctx.needs_input_grad[5]:
        db = rows.sum(0).to(ctx.bias_dtype)
    return (dx, None, None, None, dlow, db, *[None] * 11)


low_rank_linear.register_autograd(_gradient, setup_context=_keep)


def check_low_rank_linear(
    x: Tensor, weight: Tensor, scale: Tensor | None, zero: Tensor | None, low: Tensor, bias: Tensor | None,
    basis: Tensor, schedule: Tensor, format: str, dtype: torch.dtype,
) -> Format | None:  # fmt: skip
    """Arguments of qcompile::low_rank_linear; returns the format of the weight, None where it is float."""
    check = OpChecks("qcompile::low_rank_linear")
    check.given(x=x, weight=weight, low=low, basis=basis, schedule=schedule)
    check.float_dtype("dtype", dtype)
    if x.ndim < 1 or weight.ndim != 2:
        check.refuse("x", x, "[.., K], with a weight of two dimensions")
    check.tensor("x", x, FLOATS, x, "float")
    columns, rows, rank = x.shape[-1], weight.shape[0], basis.shape[0]
    form = check.format("format", format) if format else None
    if form is None:
        check.tensor("weight", weight, FLOATS, x, f"float [N, {columns}]", None, columns)
    else:
        check.packed("weight", weight, form, columns, x, None)
        check.codes("", weight, scale, zero, None, form, columns)
    shape = (rank, columns) if is_left(rows, columns) else (rows, rank)
    check.tensor("low", low, FLOATS, x, f"float {list(shape)}", *shape)
    if bias is not None:
        check.tensor("bias", bias, FLOATS, x, f"float [{rows}]", rows)
    check.tensor("schedule", schedule, (torch.int64,), x, "int64 [4]", 4)
    return form


def _weight(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, form: Format | None, columns: int, dtype: torch.dtype
) -> Tensor:
    if form is None:
        return weight.to(dtype)
    assert scale is not None
    return QTensor.from_stored((weight, scale, zero, None), form, columns).dequantize(dtype)
