"""Fixed-point products as a graph of roundings around PyTorch's own products, for the tests of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

import qcompile.ir.fixed_point_ops  # noqa: F401
from qcompile.numerics.fixed_point_format import FixedPointFormat
from qcompile.numerics.fixed_point_operand import batch_range, step_of
from qcompile.numerics.gradient_interval import quantize_gradient


class RoundGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded; gamma does not move."""

    @staticmethod
    def forward(ctx, y, gamma, counter, format):
        ctx.state = gamma, counter, format
        return y.clone()

    @staticmethod
    def backward(ctx, gradient):
        gamma, counter, format = ctx.state
        codes, step, _ = quantize_gradient(gradient, gamma, counter, format, format.stream)
        return codes.to(gradient.dtype) * step, None, None, None


def round_through(x: Tensor, clip: Tensor, levels: int, low: int) -> Tensor:
    """x rounded to s q; the gradient is that of the clamp."""
    step = step_of(clip, levels)
    clamped = x.clamp(float(clip) * low / levels, float(clip))
    rounded = (x / step).round().clamp(low, levels) * step
    return clamped + (rounded - clamped).detach()


def meaning(product, x, weight, bias, gamma, counter, format, act_range=None):
    """What a fixed-point product means: `product(x, weight, bias)` with roundings around it."""
    clip = batch_range(x.detach(), format.ranges, format.signed) if act_range is None else act_range
    rounded = round_through(x, clip, format.act_levels, format.lowest_act)
    weight_clip = batch_range(weight.detach(), format.ranges, True)
    out = product(rounded, round_through(weight, weight_clip, format.weight_levels, -format.weight_levels), bias)
    return RoundGradient.apply(out, gamma, counter, format)


def state(gamma=0.0):
    """act_range, gamma and counter of a site."""
    return torch.zeros(()), torch.tensor(gamma), torch.zeros((), dtype=torch.int64)


def linear_arguments(dtype=torch.float32, gamma=0.0, bias=True, **fields):
    """Arguments of fixed_point_linear that require gradients."""
    clips = [None, None]
    if fields.get("ranges") == "learned":
        clips = [torch.tensor(value, requires_grad=True) for value in (2.0, 1.5)]
    x, weight = (torch.randn(2, 5, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype))
    x = x if fields.get("signed", True) else x.abs()
    b = torch.randn(8, dtype=dtype, requires_grad=True) if bias else None
    text = str(FixedPointFormat(**fields))
    return [x.requires_grad_(), weight.requires_grad_(), b, *state(gamma), *clips, text, True, dtype]


def conv_arguments(dtype=torch.float32, spatial=2, **fields):
    """Arguments of fixed_point_conv that require gradients: two groups, strides and margins that differ."""
    arguments = linear_arguments(dtype, **fields)
    x = torch.randn(3, 4, *[7] * spatial, dtype=dtype)
    arguments[0] = (x if fields.get("signed", True) else x.abs()).requires_grad_()
    arguments[1] = torch.randn(8, 2, *[3] * spatial, dtype=dtype, requires_grad=True)
    return [*arguments, [1, 2][:spatial], [1, 0][:spatial], [2, 1][:spatial], 2]
