"""Formats: dtype, granularity, zero point and scale scheme of a quantized tensor.

    symmetric     q = clamp(round(w / s), -2^(b-1), 2^(b-1)-1)      w ~ s q          s = max|w| / (2^(b-1)-1)
    int zero      q = clamp(round(w / s) + z, 0, 2^b-1)             w ~ s (q - z)    s = (max - min) / (2^b-1)
    float zero    as int zero, but z is not rounded (what HQQ, arXiv blog 2023, and QA-LoRA,
                  arXiv:2309.14717, need)
    dual          two-level scales, w ~ s0 s1 (q - z): s0 is the float scale of a row, s1 the integer scale of a
                  group, and |s1 (q - z)| <= 127, so that s1 (q - z) is int8 (DGQ, arXiv:2310.04836 eq. 5;
                  QoQ's protective range, arXiv:2405.04532 sec. 4.1); symmetric: w ~ s0 s1 q, |s1| <= 15
    fp8           e4m3fn of w / s                                   s = max|w| / 448
    fp4           e2m1 of w / s                                     s = max|w| / 6
    fp4 m1, m2    power-of-two group scales, w ~ s 2^k e2m1: s is the float scale of a row, k <= 0 the integer
                  exponent of a group (fp4.py)
    k6            K-quants of llama.cpp, w ~ d sc q - dmin m: sc and m are integers of six bits of a group of 32, d
                  and dmin float16 of 256 columns (k_quants.py; Q4_K of GGUF)
    smooth        runtime smoothing of an activation: group scales are s_t r_g, with one s per token and
                  one r per group of channels (Rotated Runtime Smooth, arXiv:2409.20361)

Scales are per tensor, per row of the last dimension (per output channel of a weight, per token of an
activation) or per group of `group` columns; the last group may be ragged.

The scale of a weight has the dtype that files store it in: float32, or with bf16 and f16 one of 16 bits. It is rounded
to that dtype before codes are chosen, so every program that reads the file computes with the scale that the codes are
for. Of float zero points the offset s z is rounded in the same way, which is what GGUF stores of them; z stays float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from qcompile.numerics.fp4 import E2M1_MAX

CodeType = Literal["int2", "int3", "int4", "int8", "fp4", "fp8"]
Granularity = Literal["tensor", "row", "group"]
ZeroPoint = Literal["none", "int", "float"]
PowerScheme = Literal["", "m1", "m2", "m1ceil", "m2ceil"]
ScaleType = Literal["f32", "bf16", "f16"]

K_GROUP, K_BLOCK = 32, 256  # columns of a group and of a block of k6 formats

_BITS: dict[str, int] = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp4": 4, "fp8": 8}
_POWERS = ("m1", "m2", "m1ceil", "m2ceil")
_SCALES: dict[str, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Format:
    """What a tensor is quantized to; `str(format)` is text that `parse` reads back.

    Attributes:
        dtype: type of the codes.
        per: granularity of the scales: one per tensor, per row [.., K] or per group of columns.
        group: columns of a group; 0 unless per is "group".
        zero: zero points: none (symmetric), integer, or float.
        dual: two-level scales: int8-valued groups under one float scale per row (int4 with groups).
        powers: power-of-two group scales and the rounding to them (fp4 with groups); "" for free scales.
        smooth: runtime smoothing of an activation (symmetric integers with groups).
        scale: dtype of the stored scales: float32, or one of 16 bits (a single level of scales, or k6).
        k6: six-bit scales and offsets of groups under two float16 of 256 columns (int4 in groups of 32).
    """

    dtype: CodeType
    per: Granularity = "row"
    group: int = 0
    zero: ZeroPoint = "none"
    dual: bool = False
    powers: PowerScheme = ""
    smooth: bool = False
    scale: ScaleType = "f32"
    k6: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise ValueError(f"format dtype {self.dtype!r} is unknown. Fix: use one of {', '.join(_BITS)}")
        if self.per not in ("tensor", "row", "group"):
            raise ValueError(f"format granularity {self.per!r} is unknown. Fix: use one of tensor, row, group")
        if (self.per == "group") != (self.group > 0):
            raise ValueError(
                f"format {self.dtype} has granularity {self.per!r} and group size {self.group}. "
                "Fix: give a positive group size with per='group', and only there"
            )
        if self.is_float and self.zero != "none":
            raise ValueError(
                f"format {self.dtype} has zero={self.zero!r}: float codes have no zero points. "
                "Fix: drop it, or use an integer dtype"
            )
        if self.powers and (self.dtype != "fp4" or self.per != "group" or self.powers not in _POWERS):
            raise ValueError(
                f"format {self.dtype}/{self.per} with powers={self.powers!r}: power-of-two group scales are for fp4. "
                f"Fix: use fp4/group128/ with one of {', '.join(_POWERS)}"
            )
        if self.smooth and (self.is_float or self.per != "group" or self.zero != "none" or self.dual):
            raise ValueError(
                f"format {self.dtype}/{self.per} with smooth=True: runtime smoothing is for symmetric integers with "
                "groups and float scales. Fix: use for example int4/group128/smooth"
            )
        if self.dual and (self.dtype != "int4" or self.per != "group" or self.zero == "float"):
            raise ValueError(
                f"format {self.dtype}/{self.per} with dual=True: two-level scales are for int4 with groups, with "
                "integer zero points or none. Fix: use int4/group128/zero/dual or int4/group128/dual"
            )
        parts = self.dtype, self.group, self.zero, self.scale, self.dual or self.smooth
        if self.k6 and parts != ("int4", K_GROUP, "float", "f16", False):
            raise ValueError(
                f"format {self.dtype}/{self.per} with k6=True: six-bit scales are for int4 in groups of {K_GROUP}, "
                "with float16 scales and offsets, and nothing else. Fix: use int4/group32/k6"
            )
        if self.scale not in _SCALES:
            raise ValueError(f"format scale {self.scale!r} is unknown. Fix: use one of {', '.join(_SCALES)}")
        if self.scale != "f32" and not self.k6 and (self.two_level or self.smooth):
            raise ValueError(
                f"format {self.dtype}/{self.per} with two-level or smoothed scales and scale={self.scale!r}: their "
                "scales are float32. Fix: drop it, or use a single level, as int4/group128/bf16"
            )

    def __str__(self) -> str:
        parts = [self.dtype, f"group{self.group}" if self.per == "group" else self.per]
        if self.k6:
            return "/".join([*parts, "k6"])
        parts += {"none": [], "int": ["zero"], "float": ["floatzero"]}[self.zero]
        parts += ["dual"] * self.dual + [self.powers] * bool(self.powers) + ["smooth"] * self.smooth
        parts += [self.scale] * (self.scale != "f32")
        return "/".join(parts)

    @staticmethod
    def parse(text: str) -> Format:
        """Read "int4/group128/zero", "int8/row", "fp8/row", "int4/group64/zero/dual", "int4/group32/f16", ...

        Raises:
            ValueError: an unknown word, or a combination that no format has.
        """
        dtype, *parts = text.split("/")
        per: Granularity = "row"
        zero: ZeroPoint = "none"
        powers: PowerScheme = ""
        scale: ScaleType = "f32"
        group, dual, smooth, k6 = 0, False, False, False
        for part in parts:
            if part.startswith("group") and part[5:].isdigit():
                per, group = "group", int(part[5:])
            elif part in ("row", "tensor"):
                per = "row" if part == "row" else "tensor"
            elif part in ("zero", "floatzero"):
                zero = "int" if part == "zero" else "float"
            elif part == "dual":
                dual = True
            elif part in _POWERS:
                powers = cast(PowerScheme, part)  # one of _POWERS
            elif part == "smooth":
                smooth = True
            elif part == "k6":
                k6, zero, scale = True, "float", "f16"
            elif part in _SCALES:
                scale = cast(ScaleType, part)  # one of _SCALES
            else:
                raise ValueError(
                    f"format {text!r}: {part!r} is unknown. Fix: write dtype/granularity/zero point, as in "
                    "int4/group128/zero, int8/row, fp8/row/bf16, int4/group128/floatzero, fp4/group128/m2"
                )
        # The dtype of codes is checked by __post_init__.
        return Format(cast(CodeType, dtype), per, group, zero, dual, powers, smooth, scale, k6)

    @property
    def is_float(self) -> bool:
        """Whether codes are small floats."""
        return self.dtype in ("fp4", "fp8")

    @property
    def two_level(self) -> bool:
        """Whether a group has an integer scale (a multiplier, or an exponent of two) under a float one."""
        return self.dual or bool(self.powers) or self.k6

    @property
    def is_int8_rows(self) -> bool:
        """Whether codes are symmetric int8 with a per-row or per-tensor scale: what an int8 matmul takes directly."""
        return self.dtype == "int8" and self.per != "group" and self.zero == "none"

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of unpacked codes."""
        if self.dtype == "fp8":
            return torch.float8_e4m3fn
        return torch.uint8 if self.zero != "none" or self.dtype == "fp4" else torch.int8

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of stored scales."""
        return _SCALES[self.scale]

    @property
    def zero_dtype(self) -> torch.dtype:
        """The dtype of stored zero points; of k6 those are the integers m."""
        return torch.uint8 if self.zero == "int" or self.k6 else torch.float32

    @property
    def max_value(self) -> float:
        """The largest value that a code represents at scale one, zero point aside."""
        return {"fp4": E2M1_MAX, "fp8": 448.0}.get(self.dtype, float(self.qmax))

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return _BITS[self.dtype]

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return 0 if self.code_dtype == torch.uint8 else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1 if self.code_dtype == torch.uint8 else (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Number of scales in a row of `columns`."""
        return -(-columns // self.group) if self.per == "group" else 1

    def stored_scales(self, columns: int) -> int:
        """Number of stored float scales in a row of `columns`: of two levels one, of k6 d and dmin of each block."""
        if self.k6:
            return 2 * (columns // K_BLOCK)
        return 1 if self.two_level else self.groups(columns)

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` can be stored: blocks of 256 must be whole, groups need not."""
        return not self.k6 or columns % K_BLOCK == 0

    def width(self, columns: int) -> int:
        """Columns of one group in a row of `columns`: a group beyond the row is one group of the whole row."""
        return min(self.group, max(columns, 1)) if self.per == "group" else columns
