"""Run the kernels of a stack of experts by rows of 8-bit codes, and prepare what they read."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.experts_spec import GemmExpertsA8, GemmExpertsW4A8, QuantizedExperts
from qcompile.codegen.triton.kernels.spec import GemmCodes
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.launch.experts import ExpertSizes, plan_experts
from qcompile.codegen.triton.launch.gemm import gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.codegen.triton.launch.w4a8 import prepare_w4a8
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import dequantize_to_int8, unpack_codes


def prepare_experts_a8(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, k: int
) -> tuple[Tensor, Tensor]:
    """A stored stack -> codes [E, N, K], int8 or fp8, and float32 scales [E, N, 1].

    Args:
        stored: codes [E, N, ..] as QTensor.stored() packs them.
        scale: [E, N, 1].
        zero: [E, N, groups], or None.
        group_scale: int8 [E, N, groups] of a two-level format, which becomes int8 here; None of other formats.
        form: of the codes.
        k: columns.
    """
    codes = dequantize_to_int8(unpack_codes(stored, form, k), zero, group_scale, form) if form.dual else stored
    return codes.contiguous(), scale.float().contiguous()


def prepare_experts_w4a8(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A stored stack [E, N, K] as one weight [E N, K], see w4a8.prepare_w4a8; arguments as of prepare_experts_a8.

    Raises:
        ValueError: gemm_w4a8 does not take the format.
    """
    codes, scales = stored.flatten(0, 1), scale.flatten(0, 1)
    points, steps = (None if part is None else part.flatten(0, 1) for part in (zero, group_scale))
    return prepare_w4a8(codes, scales, points, steps, form, k)


def plan_experts_a8(
    x: Tensor, rows: Tensor | None, ends: Tensor, channels: int, dtype: torch.dtype, split_k: int = 0
) -> GemmPlan | None:
    """The launches of a product of 8-bit codes x [T, K] and a stack [E, N, K]; None where the result is empty.

    Args:
        x: int8 or fp8.
        rows: of x, as of experts.linear_experts.
        ends: of the rows of each expert.
        channels: N.
        dtype: of the result.
        split_k: as of experts.linear_experts.
    """
    ragged = x.shape[1] % Launch.block_k != 0
    codes: GemmCodes = "int8" if x.dtype == torch.int8 else "fp8"
    spec = GemmExpertsA8(NAMES[dtype], codes, ragged=ragged, gather=rows is not None)
    return _plan(spec, x, rows, ends, channels, split_k)


def plan_experts_w4a8(
    x: Tensor, rows: Tensor | None, ends: Tensor, channels: int, layout: WeightLayout, dtype: torch.dtype,
    split_k: int = 0,
) -> GemmPlan | None:  # fmt: skip
    """The same of int8 rows and 4-bit codes in a layout; further arguments as of plan_experts_a8."""
    ragged = x.shape[1] % layout.block != 0
    spec = GemmExpertsW4A8(NAMES[dtype], layout.group, layout.chunk, ragged=ragged, gather=rows is not None)
    return _plan(spec, x, rows, ends, channels, split_k)


def _plan(
    spec: QuantizedExperts, x: Tensor, rows: Tensor | None, ends: Tensor, channels: int, split_k: int
) -> GemmPlan | None:
    sizes = ExpertSizes(len(x if rows is None else rows), len(x), len(ends), channels, x.shape[1])
    return plan_experts(gpu(x.device), spec, sizes, split_k) if sizes.rows and channels else None
