"""What the kernel of 4-bit weights and 8-bit activations computes.

gemm_w4a8    x [M, K] int8  @  W [N, K] 4-bit codes, which become int8 in registers; sums in int32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.codegen.triton.kernels.spec import ActScales, KernelSpec


@dataclass(frozen=True)
class GemmW4A8(KernelSpec):
    """out = (x W^T) x_scale scale [+ low up^T] [+ bias] [+ residual], W the integers of 4-bit codes.

    W is s1 (q - z) of two-level formats, an int8 (QoQ, arXiv:2405.04532; DGQ, arXiv:2310.04836), or q - z of codes with
    one scale a channel. There too z is subtracted in registers, two instructions for four weights: z times the sums of
    the rows of x, the other form of QoQ, would occupy the tensor cores for those sums, of which large M has none to
    spare.

    Attributes:
        group: columns that share s1 and z; 0: a channel, whose codes share z.
        chunk: columns that one shift of the packed bytes gives (weight_layout.py).
        act: granularity of x_scale, as in Gemm8.
        ragged: whether K is no multiple of a block of packed columns.
        parts: split-K, as in Gemm8: the partial sums are int32.
        bias: as in GemmW.
        residual: as in GemmW.
        low_rank: as in Gemm8.
    """

    template: ClassVar[str] = "gemm_w4a8"
    group: int = 128
    chunk: int = 64
    act: ActScales = "row"
    ragged: bool = False
    parts: bool = False
    bias: bool = False
    residual: bool = False
    low_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk not in (32, 64):
            raise ValueError(f"{self}: chunk {self.chunk}; tensor cores take 32 columns of int8, or 64")
        if self.group % self.chunk or (self.group % self.block and self.block % self.group):
            raise ValueError(f"{self}: groups of {self.group} and blocks of {self.block} columns cross each other")
        if self.parts and (self.bias or self.residual or self.low_rank):
            raise ValueError(
                f"{self}: with split-K (parts) the partial sums have no scales yet: "
                "sum_k adds bias, residual and low_rank"
            )

    @property
    def block(self) -> int:
        """Columns that are packed together."""
        return 2 * self.chunk
