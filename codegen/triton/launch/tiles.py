"""How a kernel is run: tile sizes, warps and stages, by M.

`TABLE` holds what compiling ahead of time (aot/compile_kernels.py) proves: no spill, the right tensor core
instructions, a known budget. What `qcompile kernels tune` measured comes first where there is any (tuning_cache.py).
Tiles of weight-only GEMMs have 128 channels from one row on: with 64 of them the same rows of x would be read twice as
often, and half as many bytes of weights would be on their way at a time. Beyond 128 rows reading x is what bounds a
GEMM, and tiles have 256 channels where registers allow.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from qcompile.codegen.triton.kernels.group_spec import GemmGroup
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW, KernelSpec
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8

WeightOnly = TypeVar("WeightOnly", bound=GemmW)

M_REGIMES = (16, 32, 64, 128, 256)  # of tensor core GEMMs: M up to each, and beyond the last


@dataclass(frozen=True)
class Launch:
    """Sizes of one kernel, in Triton's words.

    Attributes:
        block_m: rows of x in a tile.
        block_n: output channels in a tile.
        num_warps: of a program.
        num_stages: tiles on their way from memory at a time.
        block_k: columns in a tile (gemm_a8 only).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_k: int = 128

    def constants(self, names: list[str]) -> dict[str, int]:
        """The constexpr arguments of a kernel with arguments of these names."""
        known = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k)
        return {name: size for name, size in known.items() if name in names}


_WEIGHT_ONLY = {
    16: Launch(16, 128, 4, 4),
    32: Launch(32, 128, 4, 4),
    64: Launch(64, 128, 8, 3),
    128: Launch(128, 128, 8, 3),
    256: Launch(128, 256, 8, 3),
}
_GROUPS = {
    16: Launch(16, 128, 4, 4),
    32: Launch(32, 128, 4, 4),
    64: Launch(64, 128, 4, 3),
    128: Launch(64, 256, 8, 3),
    256: Launch(64, 256, 8, 3),
}
_BYTES = {
    16: Launch(16, 64, 4, 4),
    32: Launch(32, 64, 4, 4),
    64: Launch(64, 128, 8, 4),
    128: Launch(128, 128, 8, 3),
    256: Launch(128, 256, 8, 3),
}
TABLE: dict[str, dict[int, Launch]] = {
    "gemm_w": _WEIGHT_ONLY,
    "gemm_experts": _WEIGHT_ONLY,
    "gemm_group": _GROUPS,
    "gemm_fp4_fp8": _GROUPS,
    "gemm_a8": _BYTES,
    "gemm_experts_a8": {**_BYTES, 256: _BYTES[128]},  # each gathered row has an address of its own, in registers
    "gemm_w4a8": {
        16: Launch(16, 128, 4, 4),
        32: Launch(32, 128, 4, 4),
        64: Launch(64, 128, 4, 3),
        128: Launch(128, 128, 8, 3),
        256: Launch(128, 256, 8, 3),
    },
    "gemm_experts_w4a8": _GROUPS,
    "sum_k": {1: Launch(1, 1024, 4, 1)},
    "sum_experts": {1: Launch(1, 512, 4, 1)},
    "dequant": {1: Launch(1, 64, 4, 1)},
    "pack": {1: Launch(1, 64, 4, 1)},
    "round_gradient": {1: Launch(1, 1024, 4, 1)},
    "round_values": {1: Launch(1, 1024, 4, 1)},
}


def compiler_options(spec: KernelSpec, launch: Launch) -> dict[str, Any]:
    """What Triton's compiler is asked for: for exact kernels no fused roundings, and integers that may wrap around."""
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    return options | dict(enable_fp_fusion=False, sanitize_overflow=False) if spec.exact else options


def m_regime(m: int) -> int:
    """The entry of M_REGIMES that an M belongs to."""
    return next((limit for limit in M_REGIMES if m <= limit), M_REGIMES[-1])


def launch_of(spec: KernelSpec, m: int = 1, capability: tuple[int, int] = (9, 0)) -> Launch:
    """The table's launch of a kernel for an M, on a GPU of a compute capability."""
    table = TABLE[spec.template]
    if isinstance(spec, GemmW) and (capability >= (10, 0) or spec.bits < 4 and m <= 32):
        # of larger tiles triton 3.6 loses the body (sm_100), or spills registers
        return Launch(m_regime(m), 64, 4, 4) if m <= 32 else Launch(64, 64, 4, 3)
    if isinstance(spec, GemmGroup):
        return table[min(m_regime(m), _most_rows(spec, capability))]
    if not isinstance(spec, (GemmW, Gemm8, GemmW4A8)):
        return next(iter(table.values()))
    regime = m_regime(m)
    return table[regime if regime < 256 or _takes_wide_tiles(spec, capability) else 128]


def _most_rows(spec: GemmGroup, capability: tuple[int, int]) -> int:
    """The largest entry of gemm_group's table whose tile fits into the registers.

    Integer sums of a group stand beside the float32 sums, and every column of a tile has a scale of x where that has
    groups.
    """
    if spec.act == "group":
        return 16 if spec.group < 128 else 64 if capability == (9, 0) and not spec.ragged else 32
    if spec.ragged or spec.group < 128 or (spec.low_rank and capability >= (10, 0)):
        return 32
    return M_REGIMES[-1]


def _takes_wide_tiles(spec: GemmW | Gemm8 | GemmW4A8, capability: tuple[int, int]) -> bool:
    """Whether a tile of 256 channels fits into the registers: it reads each row of x half as often."""
    if capability != (9, 0) or spec.ragged:
        return False
    if isinstance(spec, GemmW):
        return spec.paired and spec.bits == 4
    return not (isinstance(spec, Gemm8) and spec.codes == "int8" and spec.residual)


def place_scales(spec: WeightOnly, m: int, capability: tuple[int, int] = (9, 0)) -> WeightOnly:
    """The spec with the scales where they cost less: on the sums for small M, on the weights for large M.

    A per-channel scale is applied to the sums at the end; fp16 could not hold a small scale without loss; on sm_100
    weights go through shared memory, and triton 3.6 makes twice as many instructions of a second product there.
    """
    on_weights = m > 32 and spec.group > 0 and spec.dtype == "bf16" and capability < (10, 0)
    return dataclasses.replace(spec, scaled="weights" if on_weights else "sums")


def tiles_of(m: int, n: int, launch: Launch) -> int:
    """Tiles of an output [M, N]."""
    return -(-m // launch.block_m) * -(-n // launch.block_n)
