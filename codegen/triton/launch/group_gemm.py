"""Run the kernels of 4-bit weights with scales of groups by 8-bit codes, and prepare what they read."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.group_layout import group_layout_of, group_words
from qcompile.codegen.triton.kernels.group_spec import GemmFp4Fp8, GemmGroup
from qcompile.codegen.triton.kernels.spec import Dtype, SumK
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.launch.gemm import Epilogue, gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan, call_of_sum_k
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.pack_weights import pack_by_kernel, pack_by_torch
from qcompile.codegen.triton.launch.split_k import split_k_of
from qcompile.codegen.triton.launch.tiles import launch_of, tiles_of
from qcompile.numerics.format import Format

_MAX_RANK = 64  # of a correction whose factors leave room for a large tile


@dataclass(frozen=True)
class GroupWeight:
    """A weight W [N, K] of 4-bit codes as gemm_group and gemm_fp4_fp8 read it (kernels/group_layout.py).

    Attributes:
        packed: uint8 [N, blocks x bytes of a block].
        words: [groups, N]: float32 scales, or int64 with zero points.
        layout: of the bytes.
        columns: K.
    """

    packed: Tensor
    words: Tensor
    layout: WeightLayout
    columns: int

    def spec(self, dtype: Dtype, act: Format, epilogue: Epilogue) -> GemmGroup:
        """The kernel of this weight, for an x in the format `act` and a result in `dtype`."""
        zero = not self.words.is_floating_point()
        ragged = self.columns % self.layout.block != 0
        layout, kind = self.layout, GemmFp4Fp8 if act.dtype == "fp8" else GemmGroup
        return kind(dtype, layout.group, layout.chunk, zero, act.per, ragged, **epilogue.spec_fields)


def prepare_group(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, act: Format, k: int
) -> tuple[Tensor, Tensor]:
    """A stored weight -> bytes and words of the groups, on its device.

    Args:
        stored: codes [N, ..] as QTensor.stored() packs them.
        scale: [N, groups] or [N, 1].
        zero: of the same shape, or None.
        group_scale: int8 [N, groups], exponents of powers of two; None of other formats.
        form: of the codes.
        act: of x.
        k: columns.

    Raises:
        ValueError: no kernel takes the formats.
    """
    layout = group_layout_of(form, act)
    if layout is None:
        raise ValueError(f"{form} by {act}: no kernel multiplies codes of these formats in groups")
    pack = pack_by_kernel if stored.is_cuda else pack_by_torch
    return pack(stored, form, layout, k), group_words(scale, zero, group_scale, form, layout, k)


def linear_group(
    x: Tensor, x_scale: Tensor, weight: GroupWeight, epilogue: Epilogue, act: Format, dtype: torch.dtype,
    split_k: int = 0,
) -> Tensor:  # fmt: skip
    """Linear layer with 4-bit weights and 8-bit codes of x, scales of groups; integer sums of a group are exact.

    Args:
        x: [M, K] int8, codes less their zero points, or fp8.
        x_scale: float32: [M, 1], [M, groups] or [], as `act` says.
        weight: of [N, K].
        epilogue: added before rounding.
        act: format of x.
        dtype: of the result.
        split_k: ranges of K that are summed apart; 0 takes as many as the model of split_k.py says.

    Returns:
        x W^T with all scales, and its epilogue, [M, N].
    """
    m, n = x.shape[0], len(weight.packed)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m or not n:
        return out
    plan = plan_group(gpu(x.device), weight.spec(NAMES[dtype], act, epilogue), m, n, weight.columns, split_k)
    added = epilogue.bias, epilogue.residual, epilogue.low, epilogue.up
    with torch.cuda.device(x.get_device()):  # the current one may be another
        return plan.run((x, weight.packed, weight.words, None, *added, x_scale, weight.words), out, m, n)


@functools.lru_cache(maxsize=4096)
def plan_group(gpu: Gpu, spec: GemmGroup, m: int, n: int, k: int, split_k: int = 0) -> GemmPlan:
    """The launches of a linear layer with 4-bit weights in groups and 8-bit codes of x.

    Args:
        gpu: that runs them.
        spec: with its epilogue.
        m: rows of x.
        n: output channels.
        k: input channels.
        split_k: as of linear_group.
    """
    rows = m if spec.low_rank <= _MAX_RANK else min(m, 32)
    launch, blocks = launch_of(spec, rows, gpu.capability), -(-k // spec.block)
    split_k = min(blocks, split_k or split_k_of(m, n, -(-k // 128), 4, 1, launch, gpu.multiprocessors))
    tiles, sizes = tiles_of(m, n, launch), dict(M=m, N=n, K=k, blocks=blocks, groups=-(-k // spec.group))
    if split_k == 1:
        return GemmPlan(KernelCall(spec, launch, (tiles,), **sizes), 1, torch.float32, None)
    part = dataclasses.replace(spec, parts=True, bias=False, residual=False)
    gemm = KernelCall(part, launch, (tiles, split_k), each=-(-blocks // split_k), **sizes)
    sums = SumK(spec.dtype, bias=spec.bias, residual=spec.residual)
    return GemmPlan(gemm, split_k, torch.float32, call_of_sum_k(sums, split_k, m, n))
