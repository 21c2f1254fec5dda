"""Add a constant to every group of a quantized weight, exactly, by moving its zero points.

    s (q - z) + d = s (q - (z - d / s)):    codes and scales stay, zero points become floats

Source: QA-LoRA, arXiv:2309.14717 sec. 3.3 and algorithm 1 (the merge of a group-pooled adapter). Rounded zero points
lose it: d / s is far below one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor


def shift_obstacle(format: Format) -> str | None:
    """Why the weights of a format cannot be shifted group by group; None if they can."""
    if format.is_float:
        return f"{format} has float codes, which have no zero points"
    if format.two_level:
        return f"{format} has two-level scales, whose zero points are integers"
    if format.per != "group":
        return f"{format} has one scale for a {format.per}: quantize in groups, as int4/group32/zero"
    return None


def shift_groups(weight: QTensor, delta: Tensor) -> QTensor:
    """A weight plus one value for each group.

    Args:
        weight: [N, K] in an integer format with groups; symmetric, with integer or with float zero points.
        delta: [N, groups].

    Returns:
        The sum: the same codes (unsigned), the same scales in float32, float zero points.

    Raises:
        ValueError: a format that cannot be shifted, or a delta of another shape.
    """
    form = weight.format
    obstacle = shift_obstacle(form)
    if obstacle is not None:
        raise ValueError(f"{obstacle}. Fix: shift the float weight, and quantize it again")
    if delta.shape != weight.scale.shape:
        raise ValueError(f"delta is {list(delta.shape)}, but the weight has {list(weight.scale.shape)} groups")
    codes, zero = weight.codes, weight.zero
    if zero is None:  # the codes of a symmetric format are signed
        codes = (codes.to(torch.int16) - form.qmin).to(torch.uint8)
        zero = torch.full_like(weight.scale, -float(form.qmin))
    wide = zero.double() - delta.double() / weight.scale.double()
    scale = weight.scale.float()  # beside 16-bit scales the zero points would be rounded to what files store
    return QTensor(codes, scale, wide.float(), None, dataclasses.replace(form, zero="float", scale="f32"))
