"""Quantization parameters: choosing scale and zero point for a range, and quantizing with given ones.

In this file scales and zero points broadcast against the values, whatever the granularity: one per group of
`group_columns`' [.., groups, width], or expanded to [N, K] by `expand_qparams`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1, encode_e2m1, power_of_two
from qcompile.numerics.k_scales import single_level
from qcompile.numerics.qtensor import QTensor, expand_groups

MIN_SCALE = 1e-30  # a smaller scale becomes one: its values are zeros, and x / scale must stay finite
_TINY_F16 = 2.0**-24  # the smallest positive float16
MAX_INT8 = 127  # two-level codes times their group scale fit -127 .. 127


def min_max(groups: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The range of each group [.., width] -> two of [..]: symmetric, or with zero points one that includes zero."""
    if format.zero == "none":
        high = groups.abs().amax(-1)
        return -high, high
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)


def choose_qparams(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (None if symmetric) that map low..high onto the codes; 0 is in the range.

    Both are float32 of values that the format can store.

    Raises:
        ValueError: a scale beyond the dtype that the format stores scales in.
    """
    scale = high / format.max_value if format.zero == "none" else (high - low) / format.qmax
    scale = torch.where(scale.abs() <= MIN_SCALE, torch.ones_like(scale), scale)  # NaN stays
    scale = storable_scale(scale, format)
    if format.zero == "none":
        return scale, None
    zero = -low / scale
    if format.zero == "float":
        return scale, storable_zero(zero, scale, format)
    return scale, zero.round().clamp_(format.qmin, format.qmax)  # a scale that was rounded down leaves codes short


def storable_scale(scale: Tensor, format: Format) -> Tensor:
    """Float32 scales, rounded to the dtype that the format stores them in; none becomes zero.

    Raises:
        ValueError: a scale beyond that dtype.
    """
    if format.scale == "f32":
        return scale
    stored = scale.to(format.scale_dtype).float()
    if format.scale == "f16":
        stored = torch.where(stored == 0, _TINY_F16 * scale.sign(), stored)
    if not bool(torch.isfinite(stored).all()):
        dtype, end = str(format.scale_dtype).removeprefix("torch."), torch.finfo(format.scale_dtype).max
        raise ValueError(
            f"the scale {float(scale.abs().max()):.3g} of format {format} is beyond {dtype}, which ends at {end:.5g}. "
            f"Fix: store float32 scales (drop {format.scale}), or bf16 ones"
        )
    return stored


def storable_zero(zero: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Float zero points, float32, whose offsets s z are values of the dtype that the format stores scales in.

    An offset beyond float16 keeps its zero point: a file of such scales cannot hold it, and its writer says so.
    """
    if format.scale == "f32":
        return zero
    offset = (scale * zero).to(format.scale_dtype).float()
    return torch.where(torch.isfinite(offset), offset / scale, zero)


def quantize_with_qparams(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """Values -> codes of `format.code_dtype`: x / scale + zero, rounded half to even and clamped."""
    if format.dtype == "fp8":
        return (x / scale).clamp(-format.max_value, format.max_value).to(torch.float8_e4m3fn)
    if format.dtype == "fp4":
        return encode_e2m1(x / scale)
    return _integer_codes(x, scale, zero, format).to(format.code_dtype)


def _integer_codes(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """The codes of an integer format, still as floats."""
    codes = x / scale
    if zero is None:
        codes.round_()
    elif format.zero == "int":  # rounded before an integer zero point is added (see format.py), after a float one
        codes.round_().add_(zero)
    else:
        codes.add_(zero).round_()
    return codes.clamp_(format.qmin, format.qmax)


def dequantize_with_qparams(codes: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """Codes -> float32 values, (codes - zero) * scale; the inverse of `quantize_with_qparams`."""
    value = decode_e2m1(codes) if format.dtype == "fp4" else codes.float()
    return (value if zero is None else value - zero) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor | None, format: Format, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    """Quantize and dequantize with given parameters.

    Args:
        x: float32 values.
        scale: scales.
        zero: zero points, or None.
        format: the format.
        low: the least allowed codes, where they bind more tightly than the format's (with `high`).
        high: the greatest allowed codes.

    Returns:
        `dequantize_with_qparams(quantize_with_qparams(x))`, with codes clamped to low..high in between.
    """
    if format.is_float:
        return dequantize_with_qparams(quantize_with_qparams(x, scale, zero, format), scale, zero, format)
    codes = _integer_codes(x, scale, zero, format)
    if low is not None and high is not None:
        codes.clamp_(low, high)
    return (codes if zero is None else codes.sub_(zero)).mul_(scale)


def expand_qparams(q: QTensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Scale, zero point, least and greatest code of every element of a matrix, [N, K] each.

    The scale includes the group scale of two-level formats. Least and greatest code are None unless they bind more
    tightly than the format's own (dual with zero points).
    """
    shape, format = q.codes.shape, q.format
    if format.k6:
        _, step, offset, _ = single_level(*q.parts)
        assert offset is not None
        return expand_groups(step, format, q.columns), expand_groups(offset, format, q.columns), None, None
    if format.powers:
        assert q.group_scale is not None
        return q.scale * expand_groups(power_of_two(q.group_scale), format, q.columns), None, None, None
    scale = (expand_groups(q.scale, format, q.columns) if not format.dual else q.scale).float()
    zero = None if q.zero is None else expand_groups(q.zero, format, q.columns).float()
    zero = None if zero is None else zero.expand(shape)
    if not format.dual:
        return scale.expand(shape), zero, None, None
    assert q.group_scale is not None
    group_scale = expand_groups(q.group_scale, format, q.columns).float()
    if zero is None:
        return scale * group_scale, None, None, None
    reach = (MAX_INT8 / group_scale).floor()
    low, high = (zero - reach).clamp_min(0), (zero + reach).clamp_max(format.qmax)
    return scale * group_scale, zero, low.to(torch.uint8), high.to(torch.uint8)
