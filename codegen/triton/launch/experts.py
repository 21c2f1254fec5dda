"""Run the kernels of a stack of expert weights, and prepare what the weight-only one reads."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.experts_spec import (
    AnyExperts,
    GemmExperts,
    GemmExpertsA8,
    GemmExpertsW4A8,
    SumExperts,
)
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import GemmCodes, SumK
from qcompile.codegen.triton.launch.gemm import PackedWeight, gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.launch.split_k import split_k_of
from qcompile.codegen.triton.launch.tiles import launch_of, place_scales, tiles_of
from qcompile.numerics.format import Format


class ExpertsCall(KernelCall):
    """A launch of a kernel of experts, or of one that adds its partial sums."""

    names = ("x", "rows", "ends", "w", "scale", "zero", "x_scale", "steps", "out", "sums")


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a product of rows by the weights of their experts.

    Attributes:
        rows: S, of the product.
        source_rows: T, of x.
        experts: E.
        channels: N of an expert.
        columns: K.
    """

    rows: int
    source_rows: int
    experts: int
    channels: int
    columns: int


def prepare_experts(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, k: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A stored stack [E, N, K] as one weight [E N, K], see pack_weights.prepare.

    Args:
        stored: codes [E, N, ..] as QTensor.stored() packs them.
        scale: [E, N, groups] or [E, N, 1].
        zero: [E, N, groups], or None.
        group_scale: [E, N, groups] of a dual format, or None.
        form: of the codes.
        k: columns.
        dtype: of x.

    Raises:
        ValueError: no kernel reads the format.
    """
    parts = [None if part is None else part.flatten(0, 1) for part in (stored, scale, zero, group_scale)]
    codes, scales, zeros, group_scales = parts
    assert codes is not None and scales is not None
    return prepare(codes, scales, zeros, group_scales, form, k, dtype)


def linear_experts(x: Tensor, rows: Tensor | None, ends: Tensor, weight: PackedWeight, split_k: int = 0) -> Tensor:
    """Rows of x, sorted by expert, times the weight of each row's expert.

    Args:
        x: [T, K] bf16 or fp16.
        rows: int32 or int64 [S]: row i of the product is row rows[i] of x; None is all rows of x in their order.
        ends: int32 or int64 [E], one past the last row of each expert, rising.
        weight: of [E N, K].
        split_k: ranges of K that are summed apart; 0 takes as many as the model of split_k.py says.

    Returns:
        [S, N]; rows beyond the last end are zero.
    """
    count, experts = len(x if rows is None else rows), len(ends)
    sizes = ExpertSizes(count, len(x), experts, len(weight.packed) // experts, weight.columns)
    out = x.new_empty(count, sizes.channels)
    if not out.numel():
        return out
    spec = GemmExperts(NAMES[x.dtype], **weight.spec_fields, gather=rows is not None)
    with torch.cuda.device(x.get_device()):  # the current one may be another
        plan = plan_experts(gpu(x.device), spec, sizes, split_k)
        tensors = x, rows, ends, weight.packed, weight.scale, weight.zero, None, None
        return plan.run(tensors, out, sizes.rows, sizes.channels)


@functools.lru_cache(maxsize=4096)
def plan_experts(gpu: Gpu, spec: AnyExperts, sizes: ExpertSizes, split_k: int = 0) -> GemmPlan:
    """The launches of a product of experts: tiles for the rows that an expert has on average.

    Its grid is a bound: every expert, and the rows without one, may end in a tile that is not full. Split-K is chosen
    for those that have work on average: the tiles of as many experts as there are rows, at most all.

    Args:
        gpu: that runs them.
        spec: of the product, without split-K.
        sizes: of the product.
        split_k: as of linear_experts.
    """
    m, n, k = -(-sizes.rows // sizes.experts), sizes.channels, sizes.columns
    launch = launch_of(spec, m, gpu.capability)
    block = launch.block_k if isinstance(spec, GemmExpertsA8) else spec.block
    bits_of_codes = 4 if isinstance(spec, GemmExpertsW4A8) else 8
    bits, x_bytes = (spec.bits, 2) if isinstance(spec, GemmExperts) else (bits_of_codes, 1)
    blocks = -(-k // block)
    busy = min(sizes.rows, sizes.experts) * tiles_of(m, n, launch)
    split_k = split_k or split_k_of(sizes.rows, n, -(-k // 128), bits, x_bytes, launch, gpu.multiprocessors, busy)
    split_k = min(blocks, split_k)
    each = -(-blocks // split_k)
    if isinstance(spec, GemmExperts):
        spec = place_scales(spec, m, gpu.capability)
    fields = dict(M=sizes.rows, T=sizes.source_rows, N=sizes.experts * n, K=k, blocks=blocks, experts=sizes.experts,
                  channels=n, EXPERTS=1 << sizes.experts.bit_length())  # fmt: skip
    grid = sizes.rows // launch.block_m + min(sizes.rows, sizes.experts + 1), -(-n // launch.block_n), split_k
    if split_k == 1:
        return GemmPlan(ExpertsCall(spec, launch, grid, **fields), 1, torch.float32, None)
    part = dataclasses.replace(spec, parts=True)
    gemm = ExpertsCall(part, launch, grid, each=each * block if isinstance(spec, GemmExpertsA8) else each, **fields)
    return GemmPlan(gemm, split_k, *_sum_of(spec, split_k, fields))


def _sum_of(spec: AnyExperts, split_k: int, fields: dict[str, int]) -> tuple[torch.dtype, ExpertsCall]:
    """Of what type partial sums are, and the launch that adds them."""
    codes: GemmCodes = "fp8" if isinstance(spec, GemmExpertsA8) and spec.codes == "fp8" else "int8"
    sums = SumK(spec.dtype) if isinstance(spec, GemmExperts) else SumExperts(spec.dtype, codes, spec.gather)
    launch, n = launch_of(sums), fields["channels"]
    call = ExpertsCall(sums, launch, (fields["M"], -(-n // launch.block_n)), parts=split_k, **{**fields, "N": n})
    return torch.int32 if isinstance(sums, SumExperts) and codes == "int8" else torch.float32, call
