"""Gradients of the operators that train in fixed point: one rounded gradient G serves dX, dW and db.

    dX = s_g s_w (G_q W_q) inside the clip, else 0        dW = s_g s_x (G_q^T X_q) inside the clip, else 0
    db = s_g (sum of G_q)                                 learned clips: see numerics/fixed_point_operand.py

Source: arXiv:2407.12637. Sums are of integers, exact, and scaled once. The state of a site (gamma, the counter of
draws, the running range of activations) moves here and nowhere else, so a forward pass that is repeated (activation
checkpointing) or whose gradient nobody needs does not move it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.numerics.code_convolution import ConvolutionShape, input_sums, weight_sums
from qcompile.numerics.code_matmul import code_matmul
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.fixed_point_operand import clip_gradient, inside_clip, moved_range
from qcompile.numerics.gradient_interval import quantize_gradient

_RANK_STRIDE = 0x2545F491  # between the streams of two processes; not that of counters, or one would repeat another


@torch.library.custom_op("qcompile::fixed_point_round_gradient", mutates_args=("act_range", "gamma", "counter"))
def round_gradient(
    gradient: Tensor, act_range: Tensor, gamma: Tensor, counter: Tensor, ranges: Tensor, format: str, training: bool
) -> tuple[Tensor, Tensor]:
    """Codes of the gradient of a site's output; moves the state of the site where it trains.

    Args:
        gradient: any shape.
        act_range: the running range of activations, float32 [].
        gamma: of the gradient's interval, float32 [].
        counter: of the draws, int64 [].
        ranges: the clips of activation and weight in the forward pass, float32 [2].
        format: of the site.
        training: whether state moves.

    Returns:
        Codes int8 of the same shape, and the step float32 [].
    """
    form = FixedPointFormat.parse(format)
    codes, step, following = quantize_gradient(gradient, gamma, counter, form, form.stream + _RANK_STRIDE * _rank())
    if training and gradient.numel():
        act_range.copy_(torch.where(torch.isfinite(step), moved_range(act_range, ranges[0]), act_range))
        gamma.copy_(following)
        counter.add_(1)
    return codes, step


@round_gradient.register_fake
def _(
    gradient: Tensor, act_range: Tensor, gamma: Tensor, counter: Tensor, ranges: Tensor, format: str, training: bool
) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(gradient, dtype=torch.int8, memory_format=torch.contiguous_format)
    return codes, gradient.new_empty((), dtype=torch.float32)


def _rank() -> int:
    """Of this process in a distributed run: processes must not round different gradients by the same draws."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


@torch.library.custom_op("qcompile::fixed_point_linear_backward", mutates_args=())
def linear_backward(
    gradient: Tensor, step: Tensor, x: Tensor, weight: Tensor, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias before the clip, from codes.

    Args:
        gradient: codes int8 [.., N].
        step: of these codes, float32 [].
        x: codes int8 [.., K].
        weight: codes int8 [N, K].
        scales: the steps of x and weight, float32 [2].
        dtype: of the results.

    Returns:
        [.., K], [N, K] and [N].
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = _scaled(code_matmul(rows, weight.t()), wide, step, scales[1]).view(x.shape)
    dw = _scaled(code_matmul(rows.t(), columns.t()), wide, step, scales[0])
    db = _scaled(rows.sum(0, dtype=torch.int64), wide, step)
    return dx.to(dtype), dw.to(dtype), db.to(dtype)


@linear_backward.register_fake
def _(
    gradient: Tensor, step: Tensor, x: Tensor, weight: Tensor, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw = x.new_empty(x.shape, dtype=dtype), weight.new_empty(weight.shape, dtype=dtype)
    return dx, dw, weight.new_empty(weight.shape[:1], dtype=dtype)


@torch.library.custom_op("qcompile::fixed_point_conv_backward", mutates_args=())
def conv_backward(
    gradient: Tensor,
    step: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    format: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_backward`, of a convolution of x [B, C, ..] with weight [O, C / groups, ..]."""
    form = FixedPointFormat.parse(format)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape = ConvolutionShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    reach = form.gradient_levels
    dx = input_sums(gradient, weight, shape, x.shape, reach * form.weight_levels)
    dw = weight_sums(gradient, x, shape, weight.shape, reach * form.act_levels)
    db = gradient.movedim(1, 0).flatten(1).sum(1, dtype=torch.int64)
    parts = _scaled(dx, wide, step, scales[1]), _scaled(dw, wide, step, scales[0]), _scaled(db, wide, step)
    return parts[0].to(dtype).contiguous(), parts[1].to(dtype).contiguous(), parts[2].to(dtype)


@conv_backward.register_fake
def _(
    gradient: Tensor,
    step: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    format: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw = x.new_empty(x.shape, dtype=dtype), weight.new_empty(weight.shape, dtype=dtype)
    return dx, dw, weight.new_empty(weight.shape[:1], dtype=dtype)


def _scaled(sums: Tensor, dtype: torch.dtype, *scales: Tensor) -> Tensor:
    scale = scales[0].to(dtype)
    for other in scales[1:]:
        scale = scale * other.to(dtype)
    return sums.to(dtype, copy=True).mul_(scale)


def keep_operands(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What a gradient reads: codes, and where x was clipped; x itself only where its clip is learned."""
    x, weight, bias, act_range, gamma, counter, act_clip, weight_clip, format, training, dtype, *moves = inputs
    _, x_codes, weight_codes, inside, scales = output
    ctx.mark_non_differentiable(x_codes, weight_codes, inside, scales)
    kept = x if act_clip is not None else None
    ctx.save_for_backward(kept, weight, x_codes, weight_codes, inside, scales, act_clip, weight_clip)
    # Not saved tensors: a second call of the same module moves them before the first one's gradient is computed.
    ctx.state = (act_range, gamma, counter)
    ctx.format, ctx.training, ctx.moves = format, training, moves
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype


def fixed_point_gradient(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, None, None, None, dact_clip, dweight_clip, None, ...)."""
    x, weight, x_codes, weight_codes, inside, scales, act_clip, weight_clip = ctx.saved_tensors
    form = FixedPointFormat.parse(ctx.format)
    codes, step = torch.ops.qcompile.fixed_point_round_gradient(
        gradient, *ctx.state, scales[:2].clone(), ctx.format, ctx.training
    )
    x_dtype, bias_dtype = ctx.dtypes
    wide = torch.float64 if torch.float64 in (x_dtype, weight.dtype) else torch.float32
    steps = scales[2:].clone()
    if ctx.moves:
        dx, dw, db = torch.ops.qcompile.fixed_point_conv_backward(
            codes, step, x_codes, weight_codes, steps, *ctx.moves, ctx.format, wide
        )
    else:
        dx, dw, db = torch.ops.qcompile.fixed_point_linear_backward(codes, step, x_codes, weight_codes, steps, wide)
    d_act = d_weight = None
    if act_clip is not None:
        inside = inside_clip(x, scales[0], form.signed)
        d_act = clip_gradient(dx, x.to(wide), x_codes, scales[0], form.act_levels, form.signed)
        d_weight = clip_gradient(dw, weight.to(wide), weight_codes, scales[1], form.weight_levels, True)
        d_act, d_weight = (
            (d_act * act_clip.sign()).to(act_clip.dtype),
            (d_weight * weight_clip.sign()).to(weight_clip.dtype),
        )
    dx = torch.where(inside, dx, 0).to(x_dtype)
    dw = torch.where(inside_clip(weight, scales[1], True), dw, 0).to(weight.dtype)
    db = None if bias_dtype is None else db.to(bias_dtype)
    return (dx, dw, db, None, None, None, d_act, d_weight, *[None] * (3 + len(ctx.moves)))
