"""What the kernel of a stack of expert weights computes.

gemm_experts   rows of x, sorted by expert, @ the weight of each row's expert; integer codes, weight-only
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.codegen.triton.kernels.spec import GemmW


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
        if self.parts or self.bias or self.residual or self.low_rank:
            raise ValueError(f"{self}: a stack of experts has no split-K and no epilogue")
