"""Arguments of the operators that train in fixed point, checked by the real and the fake version alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.ir.op_checks import FLOATS, OpChecks, same_size
from qcompile.numerics.fixed_point_format import FixedPointFormat

State = tuple[Tensor, Tensor, Tensor]
"""act_range, gamma and counter of a site."""

Clips = tuple[Tensor | None, Tensor | None]
"""Learned clips of the activation and of the weight."""


def check_fixed_point_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: State, clips: Clips, format: str, dtype: torch.dtype
) -> FixedPointFormat:
    """Raises ValueError for arguments that no fixed_point_linear has; gives the format."""
    check = OpChecks("qcompile::fixed_point_linear")
    check.given(x=x, weight=weight)
    check.tensor("weight", weight, FLOATS, x, "a float matrix [N, K]", None, None)
    if x.dtype not in FLOATS or not x.ndim or not same_size(x.shape[-1], weight.shape[1]):
        check.refuse("x", x, f"floats [.., {weight.shape[1]}]")
    return _check_rest(check, x, weight, bias, state, clips, format, dtype)


def check_fixed_point_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: State,
    clips: Clips,
    format: str,
    moves: tuple[Sequence[int], Sequence[int], Sequence[int]],
    groups: int,
    dtype: torch.dtype,
) -> FixedPointFormat:
    """Raises ValueError for arguments that no fixed_point_conv has; `moves` are stride, padding and dilation."""
    check = OpChecks("qcompile::fixed_point_conv")
    check.given(x=x, weight=weight)
    if weight.ndim not in (3, 4) or weight.dtype not in FLOATS:
        check.refuse("weight", weight, "floats [O, C / groups, ..] with one or two spatial dimensions")
    if x.dtype not in FLOATS or x.ndim != weight.ndim or not same_size(x.shape[1], weight.shape[1] * groups):
        check.refuse("x", x, f"floats [B, {weight.shape[1] * groups}, ..] of {weight.ndim} dimensions")
    if groups < 1 or weight.shape[0] % groups:
        check.refuse("groups", groups, f"a divisor of the {weight.shape[0]} channels of the output")
    for name, sizes, least in zip(("stride", "padding", "dilation"), moves, (1, 0, 1), strict=True):
        if len(sizes) != weight.ndim - 2 or min(sizes) < least:
            check.refuse(name, list(sizes), f"{weight.ndim - 2} integers of at least {least}")
    return _check_rest(check, x, weight, bias, state, clips, format, dtype)


def check_sign(op: str, x: Tensor, form: FixedPointFormat) -> None:
    """Refuse values below zero where codes have no sign: they would all be cut to zero.

    That a site reads none is known of the graph in evaluation (analysis/nonnegative.py); a model that computes
    something else in training is found out here, in its first forward pass.

    Args:
        op: that reads them.
        x: floats of any shape; NaN counts as no value below zero.
        form: of the site.

    Raises:
        ValueError: with the site, the least value and the fix. On a GPU the same text is a failed assertion of the
            device, since waiting for a value would stall every step and no CUDA graph could be captured.
    """
    if form.signed or not x.numel():
        return
    least = x.amin()
    why = (
        "in evaluation the graph gives it no value below zero, so its codes have no sign. Fix: "
        "FixedPoint(drop_signs=False) on the float model, or let training compute what evaluation does"
    )
    site = form.site or "a site"
    if x.is_cuda:
        torch._assert_async(torch.logical_not(least < 0), f"{op}: {site} reads values below zero in training; {why}")
    elif bool(least < 0):
        raise ValueError(f"{op}: {site} reads {float(least):.3g} in training; {why}")


def _check_rest(
    check: OpChecks,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: State,
    clips: Clips,
    format: str,
    dtype: torch.dtype,
) -> FixedPointFormat:
    try:
        form = FixedPointFormat.parse(format)
    except ValueError as error:
        raise ValueError(f"{check.op}: {error}") from None
    if bias is not None:
        check.tensor("bias", bias, FLOATS, x, "floats [N]", weight.shape[0])
    act_range, gamma, counter = state
    check.given(act_range=act_range, gamma=gamma, counter=counter)
    for name, tensor, kind in (
        ("act_range", act_range, torch.float32),
        ("gamma", gamma, torch.float32),
        ("counter", counter, torch.int64),
    ):
        if tensor.dtype != kind or tensor.ndim:
            check.refuse(name, tensor, f"one {str(kind).removeprefix('torch.')} of no dimension")
    for name, clip in zip(("act_clip", "weight_clip"), clips, strict=True):
        if (clip is not None) != (form.ranges == "learned"):
            check.refuse(name, clip, "given where ranges are learned, and only there")
        if clip is not None and (clip.dtype not in FLOATS or clip.ndim):
            check.refuse(name, clip, "one float of no dimension")
    if dtype not in FLOATS:
        check.refuse("dtype", dtype, "a float dtype")
    return form
