"""qcompile::fixed_point_linear and fixed_point_conv: products that train in fixed point, forward and backward.

    y = s_x s_w (X_q W_q^T) + b         X_q, W_q: integer codes, the sum exact

Source: arXiv:2407.12637. Clips and codes are those of numerics/fixed_point_operand.py; gradients, and what the state
of a site is, stand in ir/fixed_point_gradients.py. While a site trains, the clip of its activations is that of each
batch (or learned); in evaluation it is the running range, or that of the batch while there is none (0).

Both operators give what the gradient reads beside the output, in place of which floats would be saved: the codes of x
and weight, where x is inside its clip (empty with learned clips), and [clip of x, clip of weight, step of x, step of
weight]. A format without a sign refuses values below zero while a site trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.ir.fixed_point_checks import check_fixed_point_conv, check_fixed_point_linear, check_sign
from qcompile.ir.fixed_point_gradients import fixed_point_gradient, keep_operands
from qcompile.numerics.code_convolution import ConvolutionShape, forward_sums
from qcompile.numerics.code_matmul import code_matmul
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.fixed_point_operand import batch_range, inside_clip, operand_codes, step_of

Product = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("qcompile::fixed_point_linear", mutates_args=())
def fixed_point_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_range: Tensor,
    gamma: Tensor,
    counter: Tensor,
    act_clip: Tensor | None,
    weight_clip: Tensor | None,
    format: str,
    training: bool,
    dtype: torch.dtype,
) -> Product:
    """A linear on codes.

    Args:
        x: [.., K].
        weight: [N, K].
        bias: [N], or None.
        act_range: the running range of activations, float32 []; 0: there is none.
        gamma: of the gradient's interval, float32 []; 0: not started.
        counter: of the gradients that were rounded, int64 [].
        act_clip: the learned clip of x, [], where ranges are learned.
        weight_clip: that of the weight.
        format: a FixedPointFormat as text.
        training: whether batches give the range, and gradients move the state.
        dtype: of the result.

    Returns:
        y [.., N], and what the gradient reads (see above).
    """
    state, clips = (act_range, gamma, counter), (act_clip, weight_clip)
    form = check_fixed_point_linear(x, weight, bias, state, clips, format, dtype)
    if training:
        check_sign("qcompile::fixed_point_linear", x, form)
    x_codes, weight_codes, inside, scales = _operands(x, weight, act_range, clips, form, training)
    sums = code_matmul(x_codes.view(-1, x.shape[-1]), weight_codes).view(*x.shape[:-1], len(weight))
    return _output(sums, scales, bias, 0, dtype), x_codes, weight_codes, inside, scales


@fixed_point_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_range: Tensor,
    gamma: Tensor,
    counter: Tensor,
    act_clip: Tensor | None,
    weight_clip: Tensor | None,
    format: str,
    training: bool,
    dtype: torch.dtype,
) -> Product:
    state, clips = (act_range, gamma, counter), (act_clip, weight_clip)
    form = check_fixed_point_linear(x, weight, bias, state, clips, format, dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype), *_fake_operands(x, weight, form)


fixed_point_linear.register_autograd(fixed_point_gradient, setup_context=keep_operands)


@torch.library.custom_op("qcompile::fixed_point_conv", mutates_args=())
def fixed_point_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_range: Tensor,
    gamma: Tensor,
    counter: Tensor,
    act_clip: Tensor | None,
    weight_clip: Tensor | None,
    format: str,
    training: bool,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Product:
    """A convolution on codes: x [B, C, ..], weight [O, C / groups, ..], the rest as of `fixed_point_linear`."""
    state, clips, moves = (act_range, gamma, counter), (act_clip, weight_clip), (stride, padding, dilation)
    form = check_fixed_point_conv(x, weight, bias, state, clips, format, moves, groups, dtype)
    if training:
        check_sign("qcompile::fixed_point_conv", x, form)
    x_codes, weight_codes, inside, scales = _operands(x, weight, act_range, clips, form, training)
    shape = ConvolutionShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    sums = forward_sums(x_codes, weight_codes, shape, form.act_levels * form.weight_levels)
    return _output(sums, scales, bias, weight.ndim - 2, dtype), x_codes, weight_codes, inside, scales


@fixed_point_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act_range: Tensor,
    gamma: Tensor,
    counter: Tensor,
    act_clip: Tensor | None,
    weight_clip: Tensor | None,
    format: str,
    training: bool,
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Product:
    state, clips, moves = (act_range, gamma, counter), (act_clip, weight_clip), (stride, padding, dilation)
    form = check_fixed_point_conv(x, weight, bias, state, clips, format, moves, groups, dtype)
    shape = ConvolutionShape(tuple(stride), tuple(padding), tuple(dilation), groups)
    sizes = shape.output_size(x.shape[2:], weight.shape[2:])
    return x.new_empty((x.shape[0], weight.shape[0], *sizes), dtype=dtype), *_fake_operands(x, weight, form)


fixed_point_conv.register_autograd(fixed_point_gradient, setup_context=keep_operands)


def weight_codes_of(weight: Tensor, clip: Tensor | None, form: FixedPointFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of a weight, its step and its clip; `clip` is the learned one, or None."""
    range_ = clip.detach().abs().float() if clip is not None else batch_range(weight, form.ranges, True)
    codes, step = operand_codes(weight, step_of(range_, form.weight_levels), -form.weight_levels, form.weight_levels)
    return codes.contiguous(), step, range_


def _operands(
    x: Tensor,
    weight: Tensor,
    act_range: Tensor,
    clips: tuple[Tensor | None, Tensor | None],
    form: FixedPointFormat,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    if clips[0] is not None:
        clip = clips[0].detach().abs().float()
    elif not training and bool(act_range > 0):
        clip = act_range
    else:
        clip = batch_range(x, form.ranges, form.signed)
    codes, step = operand_codes(x, step_of(clip, form.act_levels), form.lowest_act, form.act_levels)
    weight_codes, weight_step, weight_clip = weight_codes_of(weight, clips[1], form)
    learned = form.ranges == "learned"
    inside = x.new_empty(0, dtype=torch.bool) if learned else inside_clip(x, clip, form.signed)
    return codes, weight_codes, inside, torch.stack([clip, weight_clip, step, weight_step])


def _fake_operands(x: Tensor, weight: Tensor, form: FixedPointFormat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, weight_codes = x.new_empty(x.shape, dtype=torch.int8), weight.new_empty(weight.shape, dtype=torch.int8)
    inside = x.new_empty(0 if form.ranges == "learned" else x.shape, dtype=torch.bool)
    return codes, weight_codes, inside, x.new_empty(4, dtype=torch.float32)


def _output(sums: Tensor, scales: Tensor, bias: Tensor | None, spatial: int, dtype: torch.dtype) -> Tensor:
    """Sums of codes, scaled in the order in which a settled module scales them (see modules/static_quant.py)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # A tensor of its own, not a view as a sum may be: users write into outputs, and autograd forbids it for views.
    out = torch.mul(sums, scales[2].to(wide)) if sums.dtype == wide else sums.to(wide).mul_(scales[2].to(wide))
    out *= scales[3].to(wide)
    if bias is not None:
        out += bias.to(wide).view(-1, *[1] * spatial)
    return out.to(dtype).contiguous()
