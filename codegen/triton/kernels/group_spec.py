"""What the kernels of 4-bit weights with scales of groups, by activations of 8-bit codes, compute.

gemm_group     x [M, K] int8 codes  @  W [N, K] int4 codes; int32 sums of a group, float32 sums of groups
gemm_fp4_fp8   x [M, K] fp8 codes   @  W [N, K] fp4 codes, which become fp8 in registers; float32 sums
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompile.codegen.triton.kernels.spec import KernelSpec

GroupActScales = Literal["row", "tensor", "group"]


@dataclass(frozen=True)
class GemmGroup(KernelSpec):
    """out = sum over groups g of (x_g W_g^T) x_scale scale_g [+ low up^T] [+ bias] [+ residual].

    The sums of a group are exact int32 of int8 by int8: tensor cores for int4 ended with sm_80. They become float32
    when the group ends, where its scale is applied. Codes of x are bytes whatever their bits: tensor cores read that
    side from shared memory, and x is small beside W.

    Without zero points a weight is 16 (q - 8), which one instruction makes of four codes, and its scale a sixteenth.

    Attributes:
        group: columns that share a scale of W, and of x where that has scales of groups.
        chunk: columns that one shift of the packed bytes gives (weight_layout.py).
        zero: whether groups of W have zero points, which are subtracted in registers.
        act: granularity of x_scale: per token, per tensor, or per token and group.
        ragged: whether K is no multiple of a block of packed columns.
        parts: split-K: the partial sums are float32, with all scales.
        bias: as in GemmW.
        residual: as in GemmW.
        low_rank: as in GemmW; with split-K, the first part has it.
    """

    template: ClassVar[str] = "gemm_group"
    fp8: ClassVar[bool] = False
    group: int = 128
    chunk: int = 64
    zero: bool = False
    act: GroupActScales = "row"
    ragged: bool = False
    parts: bool = False
    bias: bool = False
    residual: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk not in (32, 64):
            raise ValueError(f"{self}: chunk {self.chunk}; tensor cores take 32 columns of int8, or 64")
        if self.group < self.chunk or (self.group % self.block and self.group != self.chunk):
            raise ValueError(f"{self}: groups of {self.group} and blocks of {self.block} columns cross each other")
        if self.parts and (self.bias or self.residual):
            raise ValueError(f"{self}: with split-K (parts), sum_k adds the bias and the residual")

    @property
    def block(self) -> int:
        """Columns that are packed together."""
        return 2 * self.chunk


@dataclass(frozen=True)
class GemmFp4Fp8(GemmGroup):
    """The same of fp4 weights (e2m1) and fp8 activations (e4m3), with scales of groups, powers of two among them.

    An e2m1 value is 64 times the e4m3 value of its bits, moved: sign, exponent and mantissa stay what they are, and the
    smallest, 0.5, lands among the smallest of e4m3. So every weight is exact, and 64 goes into the scale of its group.
    Powers of two between groups (ZeroQuant-FP, arXiv:2307.09782) could go into the exponents, but the float32 sums of
    128 columns are added apart anyway (Hopper's own fp8 sums have 14 bits), and a factor costs nothing there.
    """

    template: ClassVar[str] = "gemm_fp4_fp8"
    fp8: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero:
            raise ValueError(f"{self}: zero points; floats have none")
