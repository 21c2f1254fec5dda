"""Weights of gemm_w4a8: 4-bit codes in bytes, and one 32-bit word for the integer scale and zero point of a group.

Codes stay packed in memory (weight_layout.py, words of a byte: column i and, above it, i + 64). Four of them in a
register become four int8 s1 (q - z) with one product for all four, modulo 2^32:

    R = (w & 0x0F0F0F0F) s1 + (128 - z s1) 0x01010101,    bytes of  R xor 0x80808080

The digits of R to the base 256 are q s1 - z s1 + 128, which lie in 1 .. 255 where |s1 (q - z)| <= 127, as two-level
formats have it (format.py): what a product carries into the next byte, the second term takes back. So z s1 is stored
whole, not modulo 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.numerics.format import Format

_MIDDLE = 8  # the code of zero, as stored, where a format has no zero points
_MIN_CHUNK = 32  # columns that tensor cores multiply at a time


def byte_layout_of(form: Format) -> WeightLayout | None:
    """The layout of a weight that int8 activations are multiplied by; None if gemm_w4a8 does not take the format.

    It takes int4 with two-level scales in groups of 32 or 64 columns, or of a multiple of 128, and int4 per channel.
    """
    per_channel = form.per == "row" and form.zero != "float"
    if form.dtype != "int4" or not (form.dual or per_channel):
        return None
    chunk = 64
    while form.group % chunk:
        chunk //= 2
    if chunk < _MIN_CHUNK:
        return None
    layout = WeightLayout(4, chunk, form.group, word=8)
    whole = form.group % layout.block == 0 or layout.block % (form.group or 1) == 0
    return layout if whole else None


def step_words(zero: Tensor | None, group_scale: Tensor | None, rows: int, groups: int, device: torch.device) -> Tensor:
    """s1 in the lowest byte and z s1 above it; z alone of a format with one scale a channel.

    Args:
        zero: uint8 [N, groups] or [N, 1]; None is the middle code.
        group_scale: int8 [N, groups] of a two-level format, else None.
        rows: N.
        groups: of a row with its padding; those beyond the stored ones are zero.
        device: of the result.

    Returns:
        int32 [groups, N].
    """
    points = torch.full((rows, 1), _MIDDLE, dtype=torch.int32, device=device) if zero is None else zero.int()
    if group_scale is None:
        return points.t().contiguous()
    steps = group_scale.int()
    words = (steps & 0xFF) | (steps * points << 8)
    return torch.nn.functional.pad(words.t(), (0, 0, 0, max(0, groups - words.shape[1]))).contiguous()


def int8_values(codes: Tensor, steps: Tensor, layout: WeightLayout) -> Tensor:
    """Unsigned codes [N, K] and their words -> s1 (q - z), or q - z, int32 [N, K]: what the kernel multiplies x by."""
    if not layout.group:
        return codes.int() - steps.t()
    words = steps.t().repeat_interleave(layout.group, dim=1)[:, : codes.shape[1]]
    return codes.int() * (words << 24 >> 24) - (words >> 8)
