"""Quantizing a tensor to a format: round to nearest, with or without a clip search.

|w - dequantize(quantize(w))| <= s / 2 inside the range, for every integer format; the error of float codes is
relative to the value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.clip_search import search_clip
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import power_of_two, power_of_two_scales
from qcompile.numerics.k_quants import quantize_k6
from qcompile.numerics.qparams import MIN_SCALE, choose_qparams, min_max, quantize_with_qparams
from qcompile.numerics.qtensor import QTensor, StoredParts, group_columns, ungroup_columns
from qcompile.numerics.two_level import quantize_two_level

_BLOCK = 2**20  # values that are quantized at once: some MB in float32
_MASSIVE = 8.0  # a massive-activation token has a maximum this many times the median token's


def quantize_tensor(
    x: Tensor, format: Format, *, clip: bool = False, importance: Tensor | None = None, check: bool = True
) -> QTensor:
    """Quantize, rounding to nearest.

    Args:
        x: float [.., K].
        format: the format; its scales are chosen from the range of the values.
        clip: shrink each range to the one of 20 that minimizes sum |e|^2.4 (clip_search.py), of k6 search the grid
            (k_quants.py); no effect on smooth formats.
        importance: [K] how much the error of a column counts in the search of k6 grids; None: all alike. Other formats
            take no notice.
        check: raise for NaN and Inf; without, a group that holds one dequantizes to NaN.

    Returns:
        Codes, scales and zero points on the device of x.

    Raises:
        ValueError: x holds NaN or Inf, float64 values beyond float32, or values whose scale is beyond the dtype that
            the format stores scales in.
    """
    if not x.numel():
        return _quantize_empty(x, format)
    values = x.float()
    if check:
        _refuse_nan(values)
    if format.k6:
        return quantize_k6(values, format, clip, importance)
    if format.dual:
        return quantize_two_level(values, format, clip)
    if format.smooth:
        return _quantize_smooth(values, format)
    groups = group_columns(values, format)
    low, high = min_max(groups, format)
    if clip:
        low, high = search_clip(groups, low, high, format)
    scale, zero = choose_qparams(low, high, format)
    if format.powers:
        return _quantize_power_of_two(groups, scale, x.shape[-1], format)
    codes = quantize_with_qparams(groups, scale[..., None], None if zero is None else zero[..., None], format)
    if format.per == "tensor":
        codes, shape = codes.reshape(x.shape), torch.Size()
    else:
        codes, shape = ungroup_columns(codes, x.shape[-1]), scale.shape
    if zero is not None:
        zero = (zero.to(torch.uint8) if format.zero == "int" else zero).reshape(shape)
    return QTensor(codes.contiguous(), scale.reshape(shape).to(format.scale_dtype), zero, None, format)


def quantize_matrix(
    weight: Tensor, format: Format, *, clip: bool = False, importance: Tensor | None = None
) -> StoredParts:
    """The stored parts of a weight, rounded to nearest, with the float32 copies of some rows at a time.

    Args:
        weight: float [.., K].
        format: the format; a scale for the whole tensor takes all rows at once.
        clip: as of quantize_tensor.
        importance: as of quantize_tensor.

    Raises:
        ValueError: as quantize_tensor does; what it counts is of the whole weight.
    """
    rows = weight.flatten(0, -2) if weight.ndim > 1 else weight[None]
    size = max(1, _BLOCK // max(1, weight.shape[-1]))
    if format.per == "tensor" or format.smooth or len(rows) <= size:
        return quantize_tensor(weight, format, clip=clip, importance=importance).stored_parts
    _refuse_nan(weight)
    blocks = [
        quantize_tensor(block, format, clip=clip, importance=importance, check=False).stored_parts
        for block in rows.split(size)
    ]
    codes, scale, zero, group_scale = (list(parts) for parts in zip(*blocks, strict=True))

    def whole(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).reshape(*weight.shape[:-1], -1)

    def optional(parts: list[Tensor | None]) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return whole(given) if given else None

    return whole(codes), whole(scale), optional(zero), optional(group_scale)


def _refuse_nan(values: Tensor) -> None:
    ends = torch.stack(values.aminmax()).float()  # NaN is both; a mask of all values costs more than their copy
    if not bool(torch.isfinite(ends).all()):
        count = values.numel() - int(torch.isfinite(values.float()).sum())
        raise ValueError(
            f"the tensor holds {count} NaN or Inf of {values.numel()} values, which no scale can cover. "
            "Fix: repair or replace them"
        )


def _quantize_empty(x: Tensor, format: Format) -> QTensor:
    """No values: no codes, and scales of one where a row or the tensor has one."""
    shape = () if format.per == "tensor" else (*x.shape[:-1], format.groups(x.shape[-1]))
    stored = shape if format.per == "tensor" else (*x.shape[:-1], format.stored_scales(x.shape[-1]))
    scale = x.new_ones(stored, dtype=format.scale_dtype)
    zero = x.new_zeros(shape, dtype=format.zero_dtype) if format.zero != "none" else None
    group_scale = x.new_ones(shape, dtype=torch.int8) if format.two_level else None
    return QTensor(x.new_empty(x.shape, dtype=format.code_dtype), scale, zero, group_scale, format)


def _quantize_power_of_two(groups: Tensor, scale: Tensor, columns: int, format: Format) -> QTensor:
    """Round the group scales to powers of two (of themselves, or relative to the row's) and quantize with those."""
    row_scale, exponent = power_of_two_scales(scale, format.powers)
    codes = quantize_with_qparams(groups, (row_scale * power_of_two(exponent))[..., None], None, format)
    return QTensor(ungroup_columns(codes, columns).contiguous(), row_scale, None, exponent, format)


def _quantize_smooth(x: Tensor, format: Format) -> QTensor:
    """Runtime smoothing of activations [.., T, K]: r per group of channels over all tokens, then s per token.

    Massive-activation tokens, whose values are far above all others, do not count for r: a single one would shrink
    every other token's codes in its channels. Their own s covers them.
    """
    groups = group_columns(x, format)
    peaks = groups.abs().amax(-1)  # [.., T, groups]
    token = peaks.amax(-1, keepdim=True)
    ordinary = token <= _MASSIVE * token.median(-2, keepdim=True).values if x.ndim > 1 else torch.ones_like(token) > 0
    smooth = (peaks * ordinary).amax(-2, keepdim=True) if x.ndim > 1 else torch.ones_like(peaks)
    smooth = torch.where(smooth <= MIN_SCALE, torch.ones_like(smooth), smooth)  # NaN stays
    scale = (peaks / smooth).amax(-1, keepdim=True) / format.max_value * smooth
    scale = torch.where(scale <= MIN_SCALE, torch.ones_like(scale), scale)
    codes = quantize_with_qparams(groups, scale[..., None], None, format)
    return QTensor(ungroup_columns(codes, x.shape[-1]).contiguous(), scale, None, None, format)
