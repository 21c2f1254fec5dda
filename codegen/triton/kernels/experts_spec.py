"""What the kernels of a stack of expert weights compute.

gemm_experts        rows of x, sorted by expert, @ the weight of each row's expert; integer codes, weight-only
gemm_experts_a8     the same of int8 or fp8 codes on both sides, with a scale for each row and each channel
gemm_experts_w4a8   the same of int8 rows and 4-bit codes, which become int8 in registers
sum_experts         the partial sums of a split-K product of codes, in order, with the scales of rows and channels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.codegen.triton.kernels.spec import Gemm8, GemmCodes, GemmW, KernelSpec
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8


@dataclass(frozen=True)
class GemmExperts(GemmW):
    """out [S, N] = rows of x [T, K], each by the weight of its expert: the stack [E N, K] is packed as one weight.

    A tile has rows of one expert. Which, a program finds from the ends of the experts' rows, which it reads on the GPU:
    the grid depends on sizes alone, so nothing waits for the GPU, and a CUDA graph may hold the launch. Rows behind the
    last end belong to no expert and are written as zeros.

    Attributes:
        gather: row i of the product is row rows[i] of x: no sorted copy of x is made.
    """

    template: ClassVar[str] = "gemm_experts"
    gather: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_epilogue(self)


@dataclass(frozen=True)
class GemmExpertsA8(Gemm8):
    """The same of 8-bit codes, the stack being one weight [E N, K]; x_scale is gathered with the rows.

    Attributes:
        gather: as in GemmExperts.
    """

    template: ClassVar[str] = "gemm_experts_a8"
    gather: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scales(self)


@dataclass(frozen=True)
class GemmExpertsW4A8(GemmW4A8):
    """The same of int8 rows and 4-bit codes with two-level scales, or one scale a channel.

    Attributes:
        gather: as in GemmExperts.
    """

    template: ClassVar[str] = "gemm_experts_w4a8"
    gather: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scales(self)


@dataclass(frozen=True)
class SumExperts(KernelSpec):
    """out [S, N] = sums of all parts [parts, S, N], times the scale of the row, then that of its expert's channel.

    Which expert a row has is counted from the ends; partial sums of integers are added as such, so that split-K changes
    no bit. Those of gemm_experts have their scales: sum_k adds them.

    Attributes:
        codes: int8 (the sums are int32) or fp8.
        gather: as in GemmExperts.
    """

    template: ClassVar[str] = "sum_experts"
    codes: GemmCodes = "int8"
    gather: bool = False


QuantizedExperts = GemmExpertsA8 | GemmExpertsW4A8
"""Kernels whose rows are codes with a scale each."""
AnyExperts = GemmExperts | QuantizedExperts


def _check_epilogue(spec: AnyExperts) -> None:
    if spec.bias or spec.residual or spec.low_rank:
        raise ValueError(f"{spec}: a stack of experts has no epilogue")


def _check_scales(spec: QuantizedExperts) -> None:
    _check_epilogue(spec)
    if spec.act != "row":
        raise ValueError(f"{spec}: act={spec.act}; rows of experts have a scale each")
