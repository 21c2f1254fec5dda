"""The three products of a convolution, on integer codes and exact: of the input and the weight, of the gradient with
each.

Two forms give the same integers. Wide convolutions are matrix products of int8 windows (im2col) where a processor
multiplies int8 fast; on a GPU all are that have no groups. All others, grouped and narrow ones, are convolutions of the
codes as floats: exact below 2^24, and in float64 where sums may be larger. A GPU's library may transform windows
(Winograd, FFT), which is not exact: there floats are float64, and sums are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.code_matmul import code_matmul
from qcompile.numerics.int8_matmul import has_fast_int8_matmul

_EXACT = 2**24  # float32 represents every integer up to here
WIDE = 64  # channels on both sides from which windows of int8 beat float32 (measured: VNNI, 16x16 and 8x8)


@dataclass(frozen=True)
class ConvolutionShape:
    """How a convolution moves over its input, each a size for every spatial dimension (one or two).

    Attributes:
        stride: of the windows.
        padding: zeros on both sides.
        dilation: between the elements of a window.
        groups: of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def output_size(self, size: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial size of the output."""
        parts = zip(size, kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)


def forward_sums(x: Tensor, weight: Tensor, shape: ConvolutionShape, bound: int) -> Tensor:
    """The convolution of codes.

    Args:
        x: int8 [B, C, ..].
        weight: int8 [O, C / groups, ..].
        shape: of the convolution.
        bound: the largest product of two codes.

    Returns:
        [B, O, ..]: integers, as int32 or as floats.
    """
    if _is_wide(x, weight, shape):
        kernel = weight.shape[2:]
        sums = code_matmul(_windows(x, kernel, shape), _rows(weight))
        return _rows_to_channels(sums, len(x), shape.output_size(x.shape[2:], kernel))
    dtype = exact_float(bound * weight[0].numel(), x.device)
    return _convolve(x.to(dtype), weight.to(dtype), shape)


def input_sums(gradient: Tensor, weight: Tensor, shape: ConvolutionShape, size: torch.Size, bound: int) -> Tensor:
    """What the gradient of the input sums, of the shape `size` [B, C, ..]; the rest as of `forward_sums`."""
    kernel = weight.shape[2:]
    flipped = ConvolutionShape(
        shape.stride,
        tuple(d * (k - 1) - p for d, k, p in zip(shape.dilation, kernel, shape.padding, strict=True)),
        shape.dilation,
        shape.groups,
    )
    axes = tuple(range(2, weight.ndim))
    wide = _is_wide(gradient, weight, shape) and all(s == 1 for s in shape.stride) and min(flipped.padding) >= 0
    if wide:
        flipped_weight = weight.flip(axes).transpose(0, 1)
        sums = code_matmul(_windows(gradient, kernel, flipped), _rows(flipped_weight))
        return _rows_to_channels(sums, len(gradient), size[2:])
    dtype = exact_float(bound * weight[:, 0].numel() // shape.groups, gradient.device)
    x = gradient.new_empty(size, dtype=dtype)
    return _backward(gradient.to(dtype), x, weight.to(dtype), shape, (True, False))[0]


def weight_sums(gradient: Tensor, x: Tensor, shape: ConvolutionShape, size: torch.Size, bound: int) -> Tensor:
    """What the gradient of the weight sums over batch and positions, of the shape `size` [O, C / groups, ..]."""
    weight = gradient.new_empty(size)
    if _is_wide(x, weight, shape):
        rows = gradient.movedim(1, -1).reshape(-1, gradient.shape[1])
        sums = code_matmul(rows.t(), _windows(x, size[2:], shape).t())
        return sums.view(size[0], *size[2:], size[1]).movedim(-1, 1)
    positions = gradient.shape[2:].numel()
    total = gradient.new_zeros(size, dtype=torch.float64)
    samples = max(1, _EXACT // max(1, bound * positions))
    dtype = exact_float(bound * positions, x.device)
    for first in range(0, len(x), samples):
        part = slice(first, first + samples)
        total += _backward(gradient[part].to(dtype), x[part].to(dtype), weight.to(dtype), shape, (False, True))[1]
    return total


def _is_wide(x: Tensor, weight: Tensor, shape: ConvolutionShape) -> bool:
    if x.device.type != "cpu":
        return shape.groups == 1
    return shape.groups == 1 and min(weight.shape[:2]) >= WIDE and has_fast_int8_matmul()


def exact_float(largest_sum: int, device: torch.device) -> torch.dtype:
    """The narrowest float dtype in which a convolution of integers is exact on a device, once it is rounded."""
    return torch.float32 if largest_sum <= _EXACT and device.type == "cpu" else torch.float64


def _convolve(x: Tensor, weight: Tensor, shape: ConvolutionShape) -> Tensor:
    zeros = [0] * len(shape.stride)
    sums = torch.convolution(x, weight, None, shape.stride, shape.padding, shape.dilation, False, zeros, shape.groups)
    return sums if x.device.type == "cpu" else sums.round()


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, shape: ConvolutionShape, mask: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    zeros = [0] * len(shape.stride)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, shape.stride, shape.padding, shape.dilation, False, zeros, shape.groups,
        [*mask, False],
    )  # fmt: skip
    if x.device.type != "cpu":
        dx, dw = (part if part is None else part.round() for part in (dx, dw))
    return dx, dw


def _windows(x: Tensor, kernel: torch.Size, shape: ConvolutionShape) -> Tensor:
    """The windows of int8 [B, C, ..] -> [B * positions, elements of the kernel * C].

    Channels come last, so that what is copied is runs of them.
    """
    margins = [margin for p in reversed(shape.padding) for margin in (p, p)]
    padded = torch.nn.functional.pad(x.movedim(1, -1), [0, 0, *margins]).contiguous()
    sizes = shape.output_size(x.shape[2:], kernel)
    steps = padded.stride()[1:-1]
    strides = [step * s for step, s in zip(steps, shape.stride, strict=True)]
    inner = [step * d for step, d in zip(steps, shape.dilation, strict=True)]
    batch, channels = x.shape[:2]
    view = padded.as_strided((batch, *sizes, *kernel, channels), (padded.stride(0), *strides, *inner, 1))
    return view.reshape(batch * torch.Size(sizes).numel(), channels * kernel.numel())


def _rows(weight: Tensor) -> Tensor:
    """[O, C, ..] -> [O, elements of the kernel * C], in the order of `_windows`."""
    return weight.movedim(1, -1).flatten(1).contiguous()


def _rows_to_channels(rows: Tensor, batch: int, sizes: tuple[int, ...]) -> Tensor:
    """[B * positions, O] -> [B, O, ..]."""
    return rows.view(batch, *sizes, rows.shape[1]).movedim(-1, 1)
