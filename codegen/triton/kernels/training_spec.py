"""What the kernels that round in training compute (qcompile/numerics/code_rounding.py), each in one pass over memory.

    round_gradient   x [N]  ->  codes int8, and how many |x| are beyond the limit
    round_values     x [N]  ->  codes int8, and whether there is a NaN
    change_codes     codes, scales and zero points of W [N, K], and a change of it  ->  those of the sum

They give the bits that the definitions in PyTorch give on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.codegen.triton.kernels.spec import Dtype, KernelSpec


@dataclass(frozen=True)
class _Rounding(KernelSpec):
    """Float32 values, and a result of which every bit is defined."""

    dtypes: ClassVar[tuple[Dtype, ...]] = ("fp32",)
    exact: ClassVar[bool] = True
    dtype: Dtype = "fp32"


@dataclass(frozen=True)
class RoundGradient(_Rounding):
    """clamp(x / step, -levels, levels) as codes, 0 for NaN.

    Attributes:
        stochastic: rounded up with the probability of what is cut off, by the hash of counter_random.py; or to nearest.
    """

    template: ClassVar[str] = "round_gradient"
    stochastic: bool = False


@dataclass(frozen=True)
class RoundValues(_Rounding):
    """clamp(round(x / step), low, high) as codes, 0 for NaN."""

    template: ClassVar[str] = "round_values"


@dataclass(frozen=True)
class ChangeCodes(_Rounding):
    """dq(W) [keep] + change, quantized again: uint8 codes, groups with integer zero points (code_update.py).

    Attributes:
        group: columns that share a scale; a whole row if that has fewer.
        decay: the weight is multiplied by `keep` first.
        stochastic: as in RoundGradient.
    """

    template: ClassVar[str] = "change_codes"
    group: int = 256
    decay: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"{self}: groups of {self.group} columns; at least one")

    @property
    def width(self) -> int:
        """Columns of a group in a tile, a power of two."""
        return 1 << (self.group - 1).bit_length()
