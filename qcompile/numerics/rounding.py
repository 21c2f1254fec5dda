"""Rounding numbers to a format: ranges, clip search, codes, and the grid that codes stand on.

|w - dq(q(w))| <= s / 2 inside the range, for every format of integers; a float's step is relative.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import constrain, decode_e2m1, encode_e2m1, power_of_two
from qcompile.numerics.qtensor import QTensor, expand_groups, group_columns, ungroup_columns

_TINY = 1e-30  # a smaller range is zero: x / s must not become infinite
_PIVOT = 8.0  # a token whose largest value is this many times the median token's is a pivot
_PROTECTED = 119.0  # level-1 codes of a dual format: level 2 may round one int4 step past them
MAX_GROUP_SCALE = 15  # the largest integer group scale of a dual format without zero points


def quantize_tensor(x: Tensor, format: Format, *, clip: bool = False) -> QTensor:
    """Round to nearest in a format.

    Args:
        x: float, [.., K].
        format: the format.
        clip: shrink each range to the one of 20 that minimises sum |e|^2.4 (GPTQ's MSE clip).

    Raises:
        ValueError: x holds NaN or Inf.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"the tensor holds {int((~torch.isfinite(x)).sum())} NaN or Inf of {x.numel()} values")
    wide = x.float()
    if format.dual:
        return (_quantize_dual_symmetric if format.zero == "none" else _quantize_dual)(wide, format, clip)
    if format.smooth:
        return _quantize_smooth(wide, format)
    groups = group_columns(wide, format)
    low, high = _range(groups, format)
    if clip:
        low, high = _clip(groups, low, high, format)
    scale, zero = _scale(low, high, format)
    if format.powers:
        return _quantize_powers(groups, scale, x.shape[-1], format)
    shape = x.shape[:-1] + (format.groups(x.shape[-1]),) if format.per != "tensor" else ()
    codes = quantize_with_qparams(groups, scale[..., None], None if zero is None else zero[..., None], format)
    codes = codes.reshape(x.shape) if format.per == "tensor" else ungroup_columns(codes, x.shape[-1])
    stored_zero = None
    if zero is not None:
        stored_zero = (zero.to(torch.uint8) if format.zero == "int" else zero).reshape(shape)
    return QTensor(codes.contiguous(), scale.reshape(shape), stored_zero, None, format)


_SHRINKS = range(21)  # percent of a group's range that a search for its clip takes away


def _range(groups: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    if format.zero == "none":
        high = groups.abs().amax(-1)
        return -high, high
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)


def _scale(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    scale = high / format.max_value if format.zero == "none" else (high - low) / format.qmax
    scale = torch.where(scale.abs() > _TINY, scale, torch.ones_like(scale))
    if format.zero == "none":
        return scale, None
    zero = -low / scale
    return scale, zero.round().clamp(0, format.qmax) if format.zero == "int" else zero


def quantize_with_qparams(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """x / scale -> codes, rounding half to even."""
    if format.dtype == "fp8":
        return (x / scale).clamp(-format.max_value, format.max_value).to(torch.float8_e4m3fn)
    if format.dtype == "fp4":
        return encode_e2m1(x / scale)
    return _steps(x, scale, zero, format).to(format.code_dtype)


def _steps(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """The codes of a format of integers, still as floats."""
    steps = x / scale
    if zero is None:
        steps.round_()
    elif format.zero == "int":  # rounded before an integer zero is added (the law), after a real one
        steps.round_().add_(zero)
    else:
        steps.add_(zero).round_()
    return steps.clamp_(format.qmin, format.qmax)


def dequantize_with_qparams(codes: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """Codes -> float32, for scales and zeros of the codes' shape; the inverse of `encode`."""
    value = decode_e2m1(codes) if format.dtype == "fp4" else codes.float()
    return (value if zero is None else value - zero) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, format: Format, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """x rounded to nearest: `decode(encode(x))`, with codes kept in [low, high] where those are given."""
    if format.is_float:
        return dequantize_with_qparams(quantize_with_qparams(x, scale, zero, format), scale, zero, format)
    steps = _steps(x, scale, zero, format)
    if low is not None and high is not None:
        steps.clamp_(low, high)
    return (steps if zero is None else steps.sub_(zero)).mul_(scale)


def expand_qparams(q: QTensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The grid that each number of a matrix was rounded on: scale, zero, least and greatest code, [N, K].

    Least and greatest are given only where they bind more tightly than the format's own (dual).
    """
    shape, form = q.codes.shape, q.format
    if form.powers:
        assert q.group_scale is not None
        return q.scale * expand_groups(power_of_two(q.group_scale), form, q.columns), None, None, None
    scale = expand_groups(q.scale, form, q.columns) if not form.dual else q.scale
    zero = None if q.zero is None else expand_groups(q.zero, form, q.columns).float()
    zero = None if zero is None else zero.expand(shape)
    if not form.dual:
        return scale.expand(shape), zero, None, None
    assert q.group_scale is not None
    group = expand_groups(q.group_scale, form, q.columns).float()
    if zero is None:
        return scale * group, None, None, None
    max_value = (127 / group).floor()
    low, high = (zero - max_value).clamp_min(0), (zero + max_value).clamp_max(form.qmax)
    return scale * group, zero, low.to(torch.uint8), high.to(torch.uint8)


def _clip(groups: Tensor, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """For each group the shrink in 1.00, 0.99 .. 0.80 with the least sum |e|^2.4 (GPTQ's mse=True).

    A symmetric format has one code more below zero than above. Each shrink is also tried with the extreme
    on that code, which makes the scale negative where the extreme is positive (as Q4_0 of GGUF does).
    """
    uneven = format.zero == "none" and not format.is_float and -format.qmin > format.qmax and format.bits < 8
    rows = groups.flatten(0, -3) if groups.ndim > 2 else groups[None]
    lows, highs = low.reshape(rows.shape[:-1]).clone(), high.reshape(rows.shape[:-1]).clone()
    step = max(1, 2**18 // max(1, rows[0].numel()))  # what a core holds near it
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        low0, high0 = lows[start : start + step].clone(), highs[start : start + step].clone()
        ranges = [(low0, high0)]
        if uneven:
            extreme = part.gather(-1, part.abs().argmax(-1, keepdim=True))[..., 0] * format.qmax / format.qmin
            ranges.append((-extreme, extreme))
        best = torch.full_like(low0, torch.inf)
        for shrink, (bottom, top) in itertools.product(_SHRINKS, ranges):
            tried = bottom * (1 - shrink / 100), top * (1 - shrink / 100)
            scale, zero = _scale(*tried, format)
            rounded = fake_quantize(part, scale[..., None], None if zero is None else zero[..., None], format)
            error = _power_sum(rounded.sub_(part))
            better = error < best
            best = torch.where(better, error, best)
            lows[start : start + step][better] = tried[0][better]
            highs[start : start + step][better] = tried[1][better]
    return lows.reshape(low.shape), highs.reshape(high.shape)


def _power_sum(error: Tensor) -> Tensor:
    """sum |e|^2.4 over the last dimension, in place; by exp and log, which are much faster than pow."""
    return error.abs_().log_().mul_(2.4).exp_().sum(-1)


def _quantize_powers(groups: Tensor, scale: Tensor, columns: int, format: Format) -> QTensor:
    """Codes on scales that are powers of two, or powers of two below the row's."""
    row, exponent = constrain(scale, format.powers)
    codes = quantize_with_qparams(groups, (row * power_of_two(exponent))[..., None], None, format)
    return QTensor(ungroup_columns(codes, columns).contiguous(), row, None, exponent, format)


def _quantize_smooth(x: Tensor, format: Format) -> QTensor:
    """Activations [.., T, K]: r for a group of channels over all tokens, then s for each token.

    Pivot tokens, whose values are far above all others, are left out of r: one of them would shrink
    every other token's codes in its channels. Their own s covers them.
    """
    groups = group_columns(x, format)
    peaks = groups.abs().amax(-1)  # [.., T, groups]
    token = peaks.amax(-1, keepdim=True)
    ordinary = token <= _PIVOT * token.median(-2, keepdim=True).values if x.ndim > 1 else torch.ones_like(token) > 0
    smooth = (peaks * ordinary).amax(-2, keepdim=True) if x.ndim > 1 else torch.ones_like(peaks)
    smooth = torch.where(smooth > _TINY, smooth, torch.ones_like(smooth))
    scale = (peaks / smooth).amax(-1, keepdim=True) / format.max_value * smooth
    scale = torch.where(scale > _TINY, scale, torch.ones_like(scale))
    codes = quantize_with_qparams(groups, scale[..., None], None, format)
    return QTensor(ungroup_columns(codes, x.shape[-1]).contiguous(), scale, None, None, format)


def _quantize_dual(x: Tensor, format: Format, clip: bool) -> QTensor:
    """Two levels: int8 for a row inside the protective range, then int4 with integer group scales."""
    high = x.abs().amax(-1, keepdim=True)
    scale = torch.where(high > _TINY, high / _PROTECTED, torch.ones_like(high))
    wide = group_columns(x / scale, format)
    # Rounding keeps order: the extremes of the level-1 codes are the rounded extremes.
    top, bottom = wide.amax(-1).round_().clamp_min_(0), wide.amin(-1).round_().clamp_max_(0)
    found = _second_level(wide, bottom, top)
    if clip:
        best = _level_error(wide, *found)
        for shrink in range(1, 21):
            tried = _second_level(wide, bottom * (1 - shrink / 100), top * (1 - shrink / 100))
            error = _level_error(wide, *tried)
            better, best = error < best, torch.minimum(error, best)
            for old, new in zip(found, tried, strict=True):
                old[better] = new[better]
    group_scale, zero, codes = found
    return QTensor(
        ungroup_columns(codes, x.shape[-1]).to(torch.uint8).contiguous(),
        scale,
        zero.to(torch.uint8),
        group_scale.to(torch.int8),
        format,
    )


def _quantize_dual_symmetric(x: Tensor, format: Format, clip: bool) -> QTensor:
    """Two levels without zero points: s0 is a fifteenth of the largest group scale of a row, so |s1 q| <= 15 * 8.

    s1 is negative where the clip search puts a positive extreme on the code -8.
    """
    groups = group_columns(x, format)
    low, high = _range(groups, format)
    empty = high <= _TINY * format.max_value  # zeros: their scale must not make the row's
    if clip:
        low, high = _clip(groups, low, high, format)
    wanted = _scale(low, high, format)[0].masked_fill(empty, 0)
    scale = wanted.abs().amax(-1, keepdim=True) / MAX_GROUP_SCALE
    scale = torch.where(scale > _TINY / MAX_GROUP_SCALE, scale, torch.ones_like(scale))
    sign = torch.where(wanted < 0, -1.0, 1.0)
    steps = (wanted / scale).abs().round().masked_fill(empty, MAX_GROUP_SCALE)
    found = torch.zeros_like(steps), torch.empty_like(groups)
    best = torch.full_like(steps, torch.inf)
    for more in (0, -1, 1) if clip else (0,):
        # The largest stay as they are: s0 can be told from them (see the exporter to ONNX).
        tried = sign * torch.where(steps == MAX_GROUP_SCALE, steps, (steps + more).clamp(1, MAX_GROUP_SCALE))
        codes = quantize_with_qparams(groups, (tried * scale)[..., None], None, format)
        error = _power_sum((codes * (tried * scale)[..., None]).sub_(groups))
        better = error < best
        best = torch.minimum(error, best)
        for old, new in zip(found, (tried, codes.float()), strict=True):
            old[better] = new[better]
    steps, codes = found
    codes = ungroup_columns(codes, x.shape[-1]).to(torch.int8).contiguous()
    return QTensor(codes, scale, None, steps.to(torch.int8), format)


def _second_level(wide: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Integer scale and zero of each group for a range, and the codes, in units of level 1."""
    group_scale = ((top - bottom) / 15).round_().clamp_min_(1)
    zero = (-bottom / group_scale).round_().clamp_(0, 15)
    # q - z stays where s1 (q - z) fits int8; for protected codes this binds only at the very edge.
    max_value = (127 / group_scale).floor_()
    # Round once, from the real numbers, not from level 1.
    codes = (wide / group_scale[..., None]).round_().add_(zero[..., None])
    codes.clamp_((zero - max_value).clamp_min_(0)[..., None], (zero + max_value).clamp_max_(15)[..., None])
    return group_scale, zero, codes


def _level_error(wide: Tensor, group_scale: Tensor, zero: Tensor, codes: Tensor) -> Tensor:
    return _power_sum(((codes - zero[..., None]) * group_scale[..., None]).sub_(wide))
