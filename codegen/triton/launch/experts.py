"""Run the kernel of a stack of expert weights, and prepare what it reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.experts_spec import GemmExperts
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.gemm import PackedWeight, gpu
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.launch.tiles import launch_of, place_scales
from qcompile.numerics.format import Format


class ExpertsCall(KernelCall):
    """A launch of gemm_experts."""

    names = ("x", "rows", "ends", "w", "scale", "zero", "out")


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


def linear_experts(x: Tensor, rows: Tensor | None, ends: Tensor, weight: PackedWeight) -> Tensor:
    """Rows of x, sorted by expert, times the weight of each row's expert.

    Args:
        x: [T, K] bf16 or fp16.
        rows: int32 or int64 [S]: row i of the product is row rows[i] of x; None is all rows of x in their order.
        ends: int32 or int64 [E], one past the last row of each expert, rising.
        weight: of [E N, K].

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
        plan_experts(gpu(x.device), spec, sizes)((x, rows, ends, weight.packed, weight.scale, weight.zero, out))
    return out


@functools.lru_cache(maxsize=4096)
def plan_experts(gpu: Gpu, spec: GemmExperts, sizes: ExpertSizes) -> ExpertsCall:
    """The launch of a product of experts: tiles for the rows that an expert has on average.

    Its grid is a bound: every expert, and the rows without one, may end in a tile that is not full.
    """
    m = -(-sizes.rows // sizes.experts)
    launch = launch_of(spec, m, gpu.capability)
    tiles = sizes.rows // launch.block_m + min(sizes.rows, sizes.experts + 1)
    return ExpertsCall(
        place_scales(spec, m, gpu.capability), launch, (tiles, -(-sizes.channels // launch.block_n)), M=sizes.rows,
        T=sizes.source_rows, N=sizes.experts * sizes.channels, K=sizes.columns, blocks=-(-sizes.columns // spec.block),
        experts=sizes.experts, channels=sizes.channels, EXPERTS=1 << sizes.experts.bit_length(),
    )  # fmt: skip
