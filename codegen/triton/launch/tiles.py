"""How a kernel is run: sizes of tiles, warps, stages and parts, by the number of rows.

`TABLE` holds what the ahead-of-time check (compile_kernels.py) proves: no spill, the right tensor core instructions, a known
budget. A machine's own measurements (tune.py) come first where there are any. A product with few tiles is split along
K until every multiprocessor has work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW, KernelSpec

ROWS = (16, 32, 64, 128)  # the regimes of tensor core products: up to so many rows, and beyond


@dataclass(frozen=True)
class Launch:
    """Sizes of one kernel.

    Attributes:
        rows, channels, columns: of x, of the weight and along K in a tile (columns: gemm_a8 only).
        warps: of a program. stages: tiles on their way from memory.
    """

    rows: int
    channels: int
    warps: int
    stages: int
    columns: int = 128

    def constants(self, names: list[str]) -> dict[str, int]:
        """Those that a kernel with these arguments takes."""
        known = dict(BLOCK_M=self.rows, BLOCK_N=self.channels, BLOCK_K=self.columns)
        return {name: size for name, size in known.items() if name in names}


TABLE: dict[str, dict[int, Launch]] = {
    "gemm_w": {
        16: Launch(16, 64, 4, 4),
        32: Launch(32, 64, 4, 4),
        64: Launch(64, 128, 8, 3),
        128: Launch(128, 128, 8, 3),
    },
    "gemm_a8": {
        16: Launch(16, 64, 4, 4),
        32: Launch(32, 64, 4, 4),
        64: Launch(64, 128, 8, 4),
        128: Launch(128, 128, 8, 3),
    },
    "gemv_w": {4: Launch(1, 16, 4, 1)},
    "sum_k": {1: Launch(1, 1024, 4, 1)},
    "dequant": {1: Launch(1, 64, 4, 1)},
    "pack": {1: Launch(1, 64, 4, 1)},
}


def regime(rows: int) -> int:
    """The regime of a number of rows."""
    return next((limit for limit in ROWS if rows <= limit), ROWS[-1])


def launch_of(spec: KernelSpec, rows: int = 1, capability: tuple[int, int] = (9, 0)) -> Launch:
    """How to run a kernel for so many rows of x on a GPU."""
    table = TABLE[spec.template]
    if isinstance(spec, GemmW) and spec.bits in (2, 3) and rows > 32 and capability >= (10, 0):
        return Launch(64, 64, 4, 3)  # triton 3.6 loses the body of larger tiles with so many products in a step
    return table[regime(rows)] if isinstance(spec, (GemmW, Gemm8)) else next(iter(table.values()))


def scaled(spec: GemmW, rows: int) -> GemmW:
    """The spec with the scales where they cost less: few rows have few sums, many rows few weights in comparison.

    One scale for a row goes to the sums at the end; fp16 could not hold a small scale without loss.
    """
    weights = rows > 32 and spec.group > 0 and spec.dtype == "bf16"
    return dataclasses.replace(spec, scaled="weights" if weights else "sums")


def parts_of(rows: int, channels: int, steps: int, launch: Launch, multiprocessors: int) -> int:
    """Parts along K: as many as give every multiprocessor two programs, each with four steps or more."""
    tiles = -(-rows // launch.rows) * -(-channels // launch.channels)
    if rows > 64 or tiles >= multiprocessors:
        return 1
    return max(1, min(2 * multiprocessors // tiles, steps // 4))
