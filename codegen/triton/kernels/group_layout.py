"""Weights of gemm_group and gemm_fp4_fp8: 4-bit codes in bytes, and one word for the scale of a group.

Codes stay packed as for gemm_w4a8 (weight_layout.py, words of a byte: column i and, above it, i + 64). Beside them is a
word for each group and channel, which one load fetches, the float32 scale of what the kernel makes of a code:

    int4               16 (q - 8), int8
    int4, zero points  q - z, int8; 64 bits, z above the scale
    fp4                a 64th, fp8; with powers of two between groups, their product with the scale of the row
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import power_of_two

_CHUNKS = (64, 32)  # columns that tensor cores multiply at a time
_MIDDLE = 8  # the code of zero, as stored, where a format has no zero points
_MADE = {"int4": 16.0, "fp4": 2.0**-6}  # what the kernel makes of a code, in what the code stands for
_COLUMNS = 128  # whose fp8 sums are added apart, where neither side has groups


def group_layout_of(form: Format, act: Format) -> WeightLayout | None:
    """The layout of a weight that codes of x are multiplied by in groups; None if no kernel takes the formats.

    gemm_group takes int4 with one level of scales and no float zero points; gemm_fp4_fp8 all fp4. Groups are those of x
    where it has some, else those of the weight: 32 or 64 columns, or a multiple of 64.

    Args:
        form: of the weight.
        act: of x: int8 without zero points, or int4, whose codes less their zero points fit a byte; fp8 for fp4.
    """
    signed = act.zero == "none" or (act.dtype, act.zero) == ("int4", "int")
    if act.dtype not in {"int4": ("int4", "int8"), "fp4": ("fp8",)}.get(form.dtype, ()) or not signed or act.dual:
        return None
    if form.per == "tensor" or form.zero == "float" or form.dual:
        return None
    group = act.group or form.group or _COLUMNS * (form.dtype == "fp4")
    if not group or form.group % group:
        return None
    for chunk in _CHUNKS:
        if group == chunk or group % (2 * chunk) == 0:
            return WeightLayout(4, chunk, group, word=8)
    return None


def group_words(
    scale: Tensor, zero: Tensor | None, exponent: Tensor | None, form: Format, layout: WeightLayout, k: int
) -> Tensor:
    """Scales, and zero points where there are some, as the kernel reads them.

    Args:
        scale: [N, groups of the format], or [N, 1].
        zero: uint8 of the same shape, or None.
        exponent: int8 [N, groups of the format] of powers of two, or None.
        form: of the weight, whose groups may be several of the layout's.
        layout: of the packed codes.
        k: columns.

    Returns:
        [groups of the layout, N], padded to whole blocks: float32; with zero points int64.
    """
    times = form.group // layout.group if form.group else -(-k // layout.group)
    padded = -(-k // layout.block) * layout.block
    groups = -(-padded // layout.group)

    def groups_first(of: Tensor) -> Tensor:
        of = of.repeat_interleave(times, dim=1)[:, :groups]
        return torch.nn.functional.pad(of.t(), (0, 0, 0, groups - of.shape[1])).contiguous()

    scales = groups_first(scale.float() if exponent is None else scale.float() * power_of_two(exponent))
    if zero is None:
        return scales / _MADE[form.dtype]
    return (groups_first(zero).long() << 32) | (scales.view(torch.int32).long() & 0xFFFFFFFF)


def split_words(words: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """The inverse: words -> scales of codes less their zero points, float32, and those, int32; both [groups, N]."""
    if words.is_floating_point():
        return words * _MADE[form.dtype], torch.full_like(words, _MIDDLE, dtype=torch.int32)
    return words.to(torch.int32).view(torch.float32), (words >> 32).to(torch.int32)
