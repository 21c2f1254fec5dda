"""Formats: what a number becomes, and the scales that bring it back.

    symmetric     q = clamp(round(w / s), -2^(b-1), 2^(b-1)-1)      w ~ s q          s = max|w| / (2^(b-1)-1)
    int zero      q = clamp(round(w / s) + z, 0, 2^b-1)             w ~ s (q - z)    s = (max - min) / (2^b-1)
    float zero    as int zero, but z is not rounded (what HQQ, arXiv blog 2023, and QA-LoRA,
                  arXiv:2309.14717, need)
    dual          w ~ s0 s1 (q - z): s0 float for a row, s1 an integer for a group, and
                  |s1 (q - z)| <= 127, so that s1 (q - z) is int8 (DGQ, arXiv:2310.04836 eq. 5;
                  QoQ's protective range, arXiv:2405.04532 sec. 4.1); symmetric: w ~ s0 s1 q, |s1| <= 15
    fp8           e4m3fn of w / s                                   s = max|w| / 448
    fp4           e2m1 of w / s                                     s = max|w| / 6
    fp4 m1, m2    w ~ s 2^k e2m1: s float for a row, k <= 0 an integer for a group (fp4.py)
    smooth        of an activation: the scales of groups are s_t r_g, one s for a token, one r for a
                  group of channels (Rotated Runtime Smooth, arXiv:2409.20361)

One scale per tensor, per row of the last dimension (a weight's output channel, an activation's
token) or per group of `group` columns; a last group may be ragged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from qcompile.numerics.fp4 import E2M1_MAX

_BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8, "fp4": 4, "fp8": 8}
_POWERS = ("m1", "m2", "m1ceil", "m2ceil")


@dataclass(frozen=True)
class Format:
    """dtype, granularity and zero point of a quantized tensor; `str(f)` reads back by `parse`."""

    dtype: Literal["int2", "int3", "int4", "int8", "fp4", "fp8"]
    per: Literal["tensor", "row", "group"] = "row"
    group: int = 0
    zero: Literal["none", "int", "float"] = "none"
    dual: bool = False
    powers: Literal["", "m1", "m2", "m1ceil", "m2ceil"] = ""
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise ValueError(f"format dtype {self.dtype!r} is unknown; known: {', '.join(_BITS)}")
        if self.per not in ("tensor", "row", "group"):
            raise ValueError(f"format granularity {self.per!r} is unknown; known: tensor, row, group")
        if (self.per == "group") != (self.group > 0):
            raise ValueError(f"format {self.dtype}: a group size goes with per='group', got {self.group}")
        if self.is_float and (self.zero != "none" or self.dual):
            raise ValueError(f"{self.dtype} has neither zero points nor integer group scales")
        if self.powers and (self.dtype != "fp4" or self.per != "group" or self.powers not in _POWERS):
            raise ValueError(f"scales that are powers of two ({', '.join(_POWERS)}) are for fp4 with groups")
        if self.smooth and (self.is_float or self.per != "group" or self.zero != "none"):
            raise ValueError("a smooth format is a symmetric integer with groups, as int4/group128/smooth")
        if self.dual and (self.dtype != "int4" or self.per != "group" or self.zero == "float"):
            raise ValueError("a dual format is int4 with groups, with integer zero points or none")

    def __str__(self) -> str:
        parts = [self.dtype, f"group{self.group}" if self.per == "group" else self.per]
        parts += {"none": [], "int": ["zero"], "float": ["floatzero"]}[self.zero]
        parts += ["dual"] * self.dual + [self.powers] * bool(self.powers) + ["smooth"] * self.smooth
        return "/".join(parts)

    @staticmethod
    def parse(text: str) -> Format:
        """Read "int4/group128/zero", "int8/row", "fp8/row", "int4/group64/zero/dual", ..."""
        dtype, *parts = text.split("/")
        per, group, zero, dual, powers, smooth = "row", 0, "none", False, "", False
        for part in parts:
            if part.startswith("group") and part[5:].isdigit():
                per, group = "group", int(part[5:])
            elif part in ("row", "tensor"):
                per = part
            elif part in ("zero", "floatzero"):
                zero = "int" if part == "zero" else "float"
            elif part == "dual":
                dual = True
            elif part in _POWERS:
                powers = part
            elif part == "smooth":
                smooth = True
            else:
                raise ValueError(
                    f"format {text!r}: {part!r} is unknown; write dtype/granularity/zero, as in "
                    "int4/group128/zero, int8/row, fp8/row, int4/group128/floatzero, fp4/group128/m2"
                )
        return Format(dtype, per, group, zero, dual, powers, smooth)

    @property
    def is_float(self) -> bool:
        """Whether codes are small floats."""
        return self.dtype in ("fp4", "fp8")

    @property
    def two_level(self) -> bool:
        """Whether a row has a float scale and a group an integer one."""
        return self.dual or bool(self.powers)

    @property
    def is_int8_rows(self) -> bool:
        """Whether codes are int8 with one scale for a row, or for all: what integer products take as they are."""
        return self.dtype == "int8" and self.per != "group" and self.zero == "none"

    @property
    def code_dtype(self) -> torch.dtype:
        """The dtype of unpacked codes."""
        if self.dtype == "fp8":
            return torch.float8_e4m3fn
        return torch.uint8 if self.zero != "none" or self.dtype == "fp4" else torch.int8

    @property
    def max_value(self) -> float:
        """The largest number that a code can stand for at scale one."""
        return {"fp4": E2M1_MAX, "fp8": 448.0}.get(self.dtype, float(self.qmax))

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return _BITS[self.dtype]

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return 0 if self.code_dtype == torch.uint8 else -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2**self.bits - 1 if self.code_dtype == torch.uint8 else 2 ** (self.bits - 1) - 1

    def groups(self, columns: int) -> int:
        """Scales in a row of `columns`."""
        return math.ceil(columns / self.group) if self.per == "group" else 1
