"""Gradients of the dialect's operators: what autograd, eager or traced by AOTAutograd, runs backward.

    qlinear      dx = g dq(W), db = sum of g over rows; codes, scales and zero points are constants
    qexperts     the same for the rows of each expert
    hadamard     dx = g (diag(signs) H / sqrt(n))^-1, which is its transpose
    quantize     none: integers pass no gradient. QuantLinear calls fake_quantize where one is wanted.
    fake_quantize  dx = g (the straight-through estimator, arXiv:1308.3432)

Each pair is what `torch.library.register_autograd` takes (see ops.py).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.hadamard import undo_hadamard
from qcompile.numerics.qtensor import dequantize_codes, unpack_codes


def keep_qlinear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the gradient of a qlinear reads: the stored weight, which exists anyway, and nothing of x."""
    x, _, _, weight, scale, zero, group_scale, bias, format, act, columns, _ = inputs
    ctx.save_for_backward(weight, scale, zero, group_scale)
    ctx.format, ctx.act, ctx.columns = format, act, columns
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def qlinear_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, None, None, None, None, None, None, db, None, ...) for g [.., N], in the dtype of g.

    Raises:
        ValueError: x came as codes, and something wants its gradient.
    """
    dx = db = None
    _refuse_scales(ctx)
    if ctx.needs_input_grad[0]:
        # The operator, not its formula: Inductor (torch 2.13, CPU) misreads scales of ragged groups in dynamic shapes.
        values = torch.ops.qcompile.dequantize(*ctx.saved_tensors, ctx.format, ctx.columns, gradient.dtype)
        dx = (gradient @ values).to(ctx.x_dtype)
    if ctx.needs_input_grad[7]:
        db = gradient.flatten(0, -2).sum(0).to(ctx.bias_dtype) if gradient.ndim > 1 else gradient.to(ctx.bias_dtype)
    return (dx, None, None, None, None, None, None, db, None, None, None, None)


def keep_qexperts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the gradient of a qexperts reads."""
    x, _, _, ends, weight, scale, zero, group_scale, format, _, columns, _ = inputs
    ctx.save_for_backward(ends, weight, scale, zero, group_scale)
    ctx.format, ctx.columns, ctx.x_dtype = format, columns, x.dtype


def qexperts_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, None, ...) for g [S, N].

    Raises:
        ValueError: x came as codes, and something wants its gradient.
    """
    _refuse_scales(ctx)
    parts = ctx.saved_tensors
    dx: Tensor = torch.ops.qcompile.qexperts_backward(gradient.contiguous(), *parts, ctx.format, ctx.columns)
    return (dx.to(ctx.x_dtype), *[None] * 11)


@torch.library.custom_op("qcompile::qexperts_backward", mutates_args=())
def qexperts_backward(
    gradient: Tensor,
    ends: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    format: str,
    columns: int,
) -> Tensor:
    """The gradient of qexperts for x [S, K]; an operator of its own, since the rows of an expert depend on data.

    Args:
        gradient: of the result, [S, N].
        ends: as of qexperts, and so are the rest.
        weight: stored codes.
        scale: of the weight.
        zero: its zero point, or None.
        group_scale: its second-level scale, or None.
        format: of the weight.
        columns: K.

    Returns:
        [S, K] of the dtype of the gradient; rows beyond the last end are zero.
    """
    form = Format.parse(format)
    dx = gradient.new_zeros(gradient.shape[0], columns)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            s, z, g = (t if t is None or not t.ndim else t[expert] for t in (scale, zero, group_scale))
            assert s is not None
            values = dequantize_codes(unpack_codes(weight[expert], form, columns), s, z, g, form)
            dx[start:end] = gradient[start:end] @ values.to(gradient.dtype)
            start = end
    return dx


@qexperts_backward.register_fake
def _(
    gradient: Tensor,
    ends: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group_scale: Tensor | None,
    format: str,
    columns: int,
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], columns)


def keep_signs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    """What the gradient of a Hadamard transform reads: its signs."""
    ctx.save_for_backward(inputs[1])


def hadamard_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """(dx, None): the transform is orthogonal, so the inverse is the transpose."""
    dx: Tensor = torch.ops.qcompile.hadamard_backward(gradient, *ctx.saved_tensors)
    return dx, None


@torch.library.custom_op("qcompile::hadamard_backward", mutates_args=())
def hadamard_backward(gradient: Tensor, signs: Tensor) -> Tensor:
    """g [.., n] -> g H_n^T diag(signs) / sqrt(n), computed in at least float32; an operator, as H depends on n."""
    wide = gradient if gradient.dtype in (torch.float32, torch.float64) else gradient.float()
    return undo_hadamard(wide, signs.to(wide.dtype)).to(gradient.dtype).contiguous()


@hadamard_backward.register_fake
def _(gradient: Tensor, signs: Tensor) -> Tensor:
    return torch.empty_like(gradient, memory_format=torch.contiguous_format)


def quantize_gradient(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    """Raises ValueError: reached only where something read scale or zero point and wants the gradient of x."""
    _refuse_codes()


def straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """(g, None)."""
    return gradient, None


def _refuse_scales(ctx: Any) -> None:
    """Scale and zero point of x, the second and third input of a product, come from a quantize."""
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        _refuse_codes()


def _refuse_codes() -> NoReturn:
    raise ValueError(
        "a gradient reached qcompile::quantize, whose result are integers, which pass none. "
        "Fix: call QuantLinear with an x that requires a gradient, or torch.ops.qcompile.fake_quantize in its place"
    )
