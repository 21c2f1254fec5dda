"""Two-level scales of int4 (dual formats): a float scale per row and an integer scale per group.

    with zero points    w ~ s0 s1 (q - z)     level 1: w / s0 inside +-119; level 2: int4 of that, scales 1 ..
    symmetric           w ~ s0 s1 q           s0 = a fifteenth of the row's largest group scale, 1 <= |s1| <= 15

Sources: QoQ, arXiv:2405.04532 sec. 4.1 (the protective range +-119: level 2 may exceed it by one of its own scales
and s1 (q - z) still fits int8); DGQ, arXiv:2310.04836.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.clip_search import SHRINKS, clip_error, search_clip
from qcompile.numerics.format import Format
from qcompile.numerics.qparams import MIN_SCALE, choose_qparams, min_max, quantize_with_qparams
from qcompile.numerics.qtensor import QTensor, group_columns, ungroup_columns

PROTECTIVE_RANGE = 119.0  # of level 1, so that level 2 fits int8
MAX_GROUP_SCALE = 15  # without zero points: |s1 q| <= 15 * 8 fits int8
_MAX_CODE = 15  # of level 2, unsigned int4


def quantize_two_level(x: Tensor, format: Format, clip: bool) -> QTensor:
    """Quantize float32 values [.., K] to int4 with two-level scales; `clip` searches the range of each group."""
    return (_quantize_symmetric if format.zero == "none" else _quantize_with_zero)(x, format, clip)


def _quantize_with_zero(x: Tensor, format: Format, clip: bool) -> QTensor:
    """Level 1 divides a row into the protective range, level 2 quantizes its groups to int4 with integer scales."""
    high = x.abs().amax(-1, keepdim=True)
    scale = torch.where(high > MIN_SCALE, high / PROTECTIVE_RANGE, torch.ones_like(high))
    groups = group_columns(x / scale, format)
    # Rounding keeps order: the extremes of the level-1 codes are the rounded extremes.
    top, bottom = groups.amax(-1).round_().clamp_min_(0), groups.amin(-1).round_().clamp_max_(0)
    found = _quantize_level_2(groups, bottom, top)
    if clip:
        best = _level_2_error(groups, *found)
        for shrink in SHRINKS[1:]:
            candidate = _quantize_level_2(groups, bottom * (1 - shrink / 100), top * (1 - shrink / 100))
            error = _level_2_error(groups, *candidate)
            better, best = error < best, torch.minimum(error, best)
            for old, new in zip(found, candidate, strict=True):
                old[better] = new[better]
    group_scale, zero, codes = found
    return QTensor(
        ungroup_columns(codes, x.shape[-1]).to(torch.uint8).contiguous(),
        scale,
        zero.to(torch.uint8),
        group_scale.to(torch.int8),
        format,
    )


def _quantize_level_2(groups: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integer scale, zero point [.., groups] and codes [.., groups, width] of a range, as floats, in level-1 units."""
    group_scale = ((top - bottom) / _MAX_CODE).round_().clamp_min_(1)
    zero = (-bottom / group_scale).round_().clamp_(0, _MAX_CODE)
    # Rounded once, from the float values, not from level-1 codes. |s1 (q - z)| <= 119 + s1 / 2 <= 127, as s1 <= 16.
    codes = (groups / group_scale[..., None]).round_().add_(zero[..., None]).clamp_(0, _MAX_CODE)
    return group_scale, zero, codes


def _level_2_error(groups: Tensor, group_scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    return clip_error(((codes - zero[..., None]) * group_scale[..., None]).sub_(groups))


def _quantize_symmetric(x: Tensor, format: Format, clip: bool) -> QTensor:
    """Float group scales first, then integers of which the row's largest is MAX_GROUP_SCALE.

    s1 is negative where the clip search puts a positive extreme on the code -8.
    """
    groups = group_columns(x, format)
    low, high = min_max(groups, format)
    empty = high <= MIN_SCALE * format.max_value  # zeros: their scale must not become the row's
    if clip:
        low, high = search_clip(groups, low, high, format)
    ideal = choose_qparams(low, high, format)[0].masked_fill(empty, 0)
    scale = ideal.abs().amax(-1, keepdim=True) / MAX_GROUP_SCALE
    scale = torch.where(scale > MIN_SCALE / MAX_GROUP_SCALE, scale, torch.ones_like(scale))
    sign = torch.where(ideal < 0, -1.0, 1.0)
    magnitude = (ideal / scale).abs().round().masked_fill(empty, MAX_GROUP_SCALE)
    group_scale, codes = torch.zeros_like(magnitude), torch.empty_like(groups)
    best = torch.full_like(magnitude, torch.inf)
    for offset in (0, -1, 1) if clip else (0,):
        # The largest stay: s0 can be recovered from them (see the exporter to ONNX).
        moved = (magnitude + offset).clamp_min(1)
        candidate = sign * torch.where(magnitude == MAX_GROUP_SCALE, magnitude, moved)
        candidate_codes = quantize_with_qparams(groups, (candidate * scale)[..., None], None, format)
        error = clip_error((candidate_codes * (candidate * scale)[..., None]).sub_(groups))
        better = error < best
        best = torch.minimum(error, best)
        group_scale[better], codes[better] = candidate[better], candidate_codes.float()[better]
    codes = ungroup_columns(codes, x.shape[-1]).to(torch.int8).contiguous()
    return QTensor(codes, scale, None, group_scale.to(torch.int8), format)
