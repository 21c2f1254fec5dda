"""What a linear layer launches for a shape and an M: kernels, grids and split-K, decided once and kept.

A decoded token calls the same layers with the same shapes again and again; deciding costs the CPU more than launching.
Plans depend on what was measured (tuning_cache.py): a new measurement forgets them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import Gemm8, GemmW, SumK
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.split_k import split_k_of
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, place_scales, tiles_of
from qcompile.codegen.triton.launch.tuning_cache import after_a_measurement, launch_for


@dataclass(frozen=True)
class GemmPlan:
    """The launches of a GEMM.

    Attributes:
        gemm: writes the output, or with split-K partial sums.
        split_k: ranges of K.
        sum_dtype: of partial sums.
        sum_k: adds them; None without split-K.
    """

    gemm: KernelCall
    split_k: int
    sum_dtype: torch.dtype
    sum_k: KernelCall | None

    def run(self, tensors: Sequence[Tensor | None], out: Tensor, m: int, n: int) -> Tensor:
        """Launch on the current device and stream.

        Args:
            tensors: by the names of TENSORS, up to "out".
            out: [.., N] with M rows, written.
            m: rows of x.
            n: output channels.

        Returns:
            out.
        """
        if self.sum_k is None:
            self.gemm((*tensors, out, None))
            return out
        sums = torch.empty(self.split_k, m, n, dtype=self.sum_dtype, device=out.device)
        self.gemm((*tensors, sums, None))
        self.sum_k((*tensors, out, sums))
        return out


@functools.lru_cache(maxsize=4096)
def plan_weight_only(gpu: Gpu, spec: GemmW, m: int, n: int, k: int, launch: Launch | None = None) -> GemmPlan:
    """The launches of a weight-only linear layer.

    Args:
        gpu: that runs them.
        spec: with its epilogue, and scales where they are for any M.
        m: rows of x.
        n: output channels.
        k: input channels.
        launch: None takes the measured one, or the table's.
    """
    spec = place_scales(spec, m, gpu.capability)
    launch, blocks = launch or launch_for(gpu, spec, n, k, m), -(-k // spec.block)
    split_k = min(blocks, split_k_of(m, n, -(-k // 128), spec.bits, 2, launch, gpu.multiprocessors))
    part = dataclasses.replace(spec, parts=True, bias=False, residual=False)
    sums = SumK(spec.dtype, bias=spec.bias, residual=spec.residual)
    return _plan(spec, part, sums, launch, split_k, m, n, torch.float32, K=k, blocks=blocks, each=-(-blocks // split_k))


@functools.lru_cache(maxsize=4096)
def plan_8_bit(gpu: Gpu, spec: Gemm8, m: int, n: int, k: int) -> GemmPlan:
    """The launches of a linear layer with 8-bit codes on both sides; arguments as of plan_weight_only."""
    spec = dataclasses.replace(spec, ragged=k % Launch.block_k != 0)
    launch = launch_for(gpu, spec, n, k, m)
    split_k = split_k_of(m, n, -(-k // 128), 8, 1, launch, gpu.multiprocessors)
    columns = -(-k // (split_k * launch.block_k)) * launch.block_k
    part = dataclasses.replace(spec, parts=True, bias=False, residual=False, low_rank=0)
    sums = SumK(spec.dtype, spec.codes, spec.act, spec.bias, spec.residual, spec.low_rank)
    sum_dtype = torch.int32 if spec.codes == "int8" else torch.float32
    return _plan(spec, part, sums, launch, split_k, m, n, sum_dtype, K=k, each=columns)


def _plan(
    spec: GemmW | Gemm8, part: GemmW | Gemm8, sums: SumK, launch: Launch, split_k: int, m: int, n: int,
    sum_dtype: torch.dtype, **sizes: int,
) -> GemmPlan:  # fmt: skip
    tiles = tiles_of(m, n, launch)
    if split_k == 1:
        return GemmPlan(KernelCall(spec, launch, (tiles,), M=m, N=n, **sizes), 1, sum_dtype, None)
    gemm = KernelCall(part, launch, (tiles, split_k), M=m, N=n, **sizes)
    return GemmPlan(gemm, split_k, sum_dtype, call_of_sum_k(sums, split_k, m, n))


def call_of_sum_k(spec: SumK, split_k: int, m: int, n: int) -> KernelCall:
    """The launch that adds partial sums [split_k, M, N]."""
    launch = launch_of(spec)
    return KernelCall(spec, launch, (m, -(-n // launch.block_n)), M=m, N=n, parts=split_k)


@after_a_measurement
def forget_plans() -> None:
    """Decide anew, after a measurement."""
    plan_weight_only.cache_clear()
    plan_8_bit.cache_clear()
