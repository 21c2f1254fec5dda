"""Formats: what a number becomes, and the scales that bring it back.

    symmetric     q = clamp(round(w / s), -2^(b-1), 2^(b-1)-1)      w ~ s q          s = max|w| / (2^(b-1)-1)
    int zero      q = clamp(round(w / s) + z, 0, 2^b-1)             w ~ s (q - z)    s = (max - min) / (2^b-1)
    float zero    as int zero, but z is not rounded (what HQQ, arXiv blog 2023, and QA-LoRA,
                  arXiv:2309.14717, need)
    dual          w ~ s0 s1 (q - z): s0 float for a row, s1 an integer for a group, and
                  |s1 (q - z)| <= 127, so that s1 (q - z) is int8 (DGQ, arXiv:2310.04836 eq. 5;
                  QoQ's protective range, arXiv:2405.04532 sec. 4.1)
    fp8           e4m3fn of w / s                                   s = max|w| / 448

One scale per tensor, per row of the last dimension (a weight's output channel, an activation's
token) or per group of `group` columns; a last group may be ragged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcompile.packing import pack, unpack

_BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp8": 8}
_FP8_MAX = 448.0
_PROTECTED = 119.0  # level-1 codes of a dual format: level 2 may round one int4 step past them


@dataclass(frozen=True)
class Format:
    """dtype, granularity and zero point of a quantized tensor; `str(f)` reads back by `parse`."""

    dtype: Literal["int2", "int3", "int4", "int8", "fp8"]
    per: Literal["tensor", "row", "group"] = "row"
    group: int = 0
    zero: Literal["none", "int", "float"] = "none"
    dual: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise ValueError(f"format dtype {self.dtype!r} is unknown; known: {', '.join(_BITS)}")
        if self.per not in ("tensor", "row", "group"):
            raise ValueError(f"format granularity {self.per!r} is unknown; known: tensor, row, group")
        if (self.per == "group") != (self.group > 0):
            raise ValueError(f"format {self.dtype}: a group size goes with per='group', got {self.group}")
        if self.dtype == "fp8" and (self.zero != "none" or self.dual):
            raise ValueError("fp8 has neither zero points nor a second level")
        if self.dual and (self.dtype != "int4" or self.per != "group" or self.zero != "int"):
            raise ValueError("a dual format is int4 with groups and integer zero points")

    def __str__(self) -> str:
        parts = [self.dtype, f"group{self.group}" if self.per == "group" else self.per]
        parts += {"none": [], "int": ["zero"], "float": ["floatzero"]}[self.zero]
        return "/".join(parts + (["dual"] if self.dual else []))

    @staticmethod
    def parse(text: str) -> Format:
        """Read "int4/group128/zero", "int8/row", "fp8/row", "int4/group64/zero/dual", ..."""
        dtype, *parts = text.split("/")
        per, group, zero, dual = "row", 0, "none", False
        for part in parts:
            if part.startswith("group") and part[5:].isdigit():
                per, group = "group", int(part[5:])
            elif part in ("row", "tensor"):
                per = part
            elif part in ("zero", "floatzero"):
                zero = "int" if part == "zero" else "float"
            elif part == "dual":
                dual = True
            else:
                raise ValueError(
                    f"format {text!r}: {part!r} is unknown; write dtype/granularity/zero, as in "
                    "int4/group128/zero, int8/row, fp8/row, int4/group128/floatzero"
                )
        return Format(dtype, per, group, zero, dual)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return _BITS[self.dtype]

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return 0 if self.zero != "none" else -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 if self.zero != "none" else 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns`."""
        return math.ceil(columns / self.group) if self.per == "group" else 1


@dataclass(frozen=True)
class QTensor:
    """Codes [.., K] (unpacked) with scale, zero and group scale, float32 [.., groups] or [..]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_scale: Tensor | None
    format: Format

    @property
    def columns(self) -> int:
        """K."""
        return self.codes.shape[-1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for, [.., K]."""
        return dequantize_codes(self.codes, self.scale, self.zero, self.group_scale, self.format).to(dtype)

    def split(self, rows: list[int]) -> list[QTensor]:
        """Matrices [N, K] that were quantized as one, apart again; `rows` are their N."""
        per_tensor = self.format.per == "tensor"
        parts = [
            [None] * len(rows) if t is None else [t] * len(rows) if per_tensor and not t.ndim else list(t.split(rows))
            for t in (self.codes, self.scale, self.zero, self.group_scale)
        ]
        return [QTensor(c.contiguous(), s, z, g, self.format) for c, s, z, g in zip(*parts, strict=True)]

    def stored(self) -> Tensor:
        """Codes as a checkpoint holds them: unsigned and packed below 8 bits."""
        return store_codes(self.codes, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes when stored: packed codes, scales and zeros."""
        rest = [t for t in (self.scale, self.zero, self.group_scale) if t is not None]
        return self.stored().nbytes + sum(t.nbytes for t in rest)


def store_codes(codes: Tensor, format: Format) -> Tensor:
    """Unpacked codes -> the stored form: packed unsigned below 8 bits, else as they are."""
    if format.bits == 8:
        return codes
    return pack(codes if format.zero != "none" else codes.to(torch.int16) - format.qmin, format.bits)


def load_codes(stored: Tensor, format: Format, columns: int) -> Tensor:
    """The inverse of `store_codes`."""
    if format.bits == 8:
        return stored
    unsigned = unpack(stored, format.bits, columns)
    return unsigned if format.zero != "none" else (unsigned.to(torch.int8) + format.qmin)


def spread(scale: Tensor, format: Format, columns: int) -> Tensor:
    """Scales [.., groups] -> one for each column, [.., K]; other granularities broadcast."""
    if format.per != "group":
        return scale
    return scale.repeat_interleave(format.group, dim=-1)[..., :columns]


def dequantize_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, format: Format
) -> Tensor:
    """Unpacked codes -> float32."""
    columns = codes.shape[-1]
    value = codes.to(torch.float32)
    if zero is not None:
        value = value - spread(zero, format, columns).to(torch.float32)
    if format.dual:
        assert group_scale is not None
        return value * spread(group_scale, format, columns).to(torch.float32) * scale
    return value * spread(scale, format, columns)


def group_columns(x: Tensor, format: Format) -> Tensor:
    """[.., K] -> [.., groups, width]; a ragged last group is padded with zeros."""
    if format.per == "tensor":
        return x.reshape(1, -1) if x.ndim else x.reshape(1, 1)
    if format.per == "row":
        return x[..., None, :]
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % format.group))
    return x.unflatten(-1, (-1, format.group))


def ungroup_columns(groups: Tensor, columns: int) -> Tensor:
    """The inverse of `group_columns` for rows and groups: [.., groups, width] -> [.., K]."""
    return groups.flatten(-2)[..., :columns]


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
        return _quantize_dual(wide, format)
    groups = group_columns(wide, format)
    low, high = _range(groups, format)
    if clip:
        low, high = _clip(groups, low, high, format)
    scale, zero = _scale(low, high, format)
    shape = x.shape[:-1] + (format.groups(x.shape[-1]),) if format.per != "tensor" else ()
    codes = encode(groups, scale[..., None], None if zero is None else zero[..., None], format)
    codes = codes.reshape(x.shape) if format.per == "tensor" else ungroup_columns(codes, x.shape[-1])
    stored_zero = None
    if zero is not None:
        stored_zero = (zero.to(torch.uint8) if format.zero == "int" else zero).reshape(shape)
    return QTensor(codes.contiguous(), scale.reshape(shape), stored_zero, None, format)


def _range(groups: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    if format.zero == "none":
        high = groups.abs().amax(-1)
        return -high, high
    return groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)


def _scale(low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    if format.dtype == "fp8":
        scale = high / _FP8_MAX
    elif format.zero == "none":
        scale = high / format.qmax
    else:
        scale = (high - low) / format.qmax
    # Subnormal scales would turn x / s into infinity: such a group is zero.
    scale = torch.where(scale > 1e-30, scale, torch.ones_like(scale))
    if format.zero == "none":
        return scale, None
    zero = -low / scale
    return scale, zero.round().clamp(0, format.qmax) if format.zero == "int" else zero


def encode(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> Tensor:
    """x / scale -> codes, rounding half to even."""
    if format.dtype == "fp8":
        return (x / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    if zero is None:
        return (x / scale).round_().clamp_(format.qmin, format.qmax).to(torch.int8)
    # Round before adding an integer zero (the law), after adding a real one.
    steps = (x / scale).round_() + zero if format.zero == "int" else (x / scale + zero).round_()
    return steps.clamp_(format.qmin, format.qmax).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes -> float32, for scales and zeros of the codes' shape; the inverse of `encode`."""
    value = codes.float()
    return (value if zero is None else value - zero) * scale


def level_grid(q: QTensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The grid that each number of a matrix was rounded on: scale, zero, least and greatest code, [N, K].

    Least and greatest are given only where they bind more tightly than the format's own (dual).
    """
    shape, form = q.codes.shape, q.format
    scale = spread(q.scale, form, q.columns) if not form.dual else q.scale
    zero = None if q.zero is None else spread(q.zero, form, q.columns).float()
    zero = None if zero is None else zero.expand(shape)
    if not form.dual:
        return scale.expand(shape), zero, None, None
    assert q.group_scale is not None and zero is not None
    group = spread(q.group_scale, form, q.columns).float()
    reach = (127 / group).floor()
    low, high = (zero - reach).clamp_min(0), (zero + reach).clamp_max(form.qmax)
    return scale * group, zero, low.to(torch.uint8), high.to(torch.uint8)


def _clip(groups: Tensor, low: Tensor, high: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """For each group the shrink in 1.00, 0.99 .. 0.80 with the least sum |e|^2.4 (GPTQ's mse=True)."""
    rows = groups.flatten(0, -3) if groups.ndim > 2 else groups[None]
    lows, highs = low.reshape(rows.shape[:-1]).clone(), high.reshape(rows.shape[:-1]).clone()
    step = max(1, 2**22 // max(1, rows[0].numel()))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step]
        low0, high0 = lows[start : start + step].clone(), highs[start : start + step].clone()
        best = torch.full_like(low0, torch.inf)
        for shrink in range(21):
            keep = 1 - shrink / 100
            scale, zero = _scale(low0 * keep, high0 * keep, format)
            z = None if zero is None else zero[..., None]
            codes = encode(part, scale[..., None], z, format).float()
            error = ((codes - (0 if z is None else z)) * scale[..., None] - part).abs_().pow_(2.4).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            lows[start : start + step][better] = (low0 * keep)[better]
            highs[start : start + step][better] = (high0 * keep)[better]
    return lows.reshape(low.shape), highs.reshape(high.shape)


def _quantize_dual(x: Tensor, format: Format) -> QTensor:
    """Two levels: int8 for a row inside the protective range, then int4 with integer group scales."""
    high = x.abs().amax(-1, keepdim=True)
    scale = torch.where(high > 1e-30, high / _PROTECTED, torch.ones_like(high))
    groups = group_columns((x / scale).round(), format)
    top, bottom = groups.amax(-1).clamp_min(0), groups.amin(-1).clamp_max(0)
    group_scale = ((top - bottom) / 15).round().clamp_min(1)
    zero = (-bottom / group_scale).round().clamp(0, 15)
    # q - z stays where s1 (q - z) fits int8; for protected codes this binds only at the very edge.
    reach = (127 / group_scale).floor()
    wide = group_columns(x / scale, format)  # round once, from the real numbers, not from level 1
    codes = (wide / group_scale[..., None]).round() + zero[..., None]
    low = (zero - reach).clamp_min(0)[..., None]
    codes = codes.clamp(low, (zero + reach).clamp_max(15)[..., None])
    return QTensor(
        ungroup_columns(codes, x.shape[-1]).to(torch.uint8).contiguous(),
        scale,
        zero.to(torch.uint8),
        group_scale.to(torch.int8),
        format,
    )
