"""Run the kernel of 4-bit weights and int8 activations, and prepare what it reads."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.spec import ActScales, Dtype, SumK
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of, step_words
from qcompile.codegen.triton.kernels.w4a8_spec import GemmW4A8
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.launch.gemm import Epilogue, gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan, call_of_sum_k
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.pack_weights import pack_by_kernel, pack_by_torch
from qcompile.codegen.triton.launch.split_k import split_k_of
from qcompile.codegen.triton.launch.tiles import launch_of, tiles_of
from qcompile.numerics.format import Format


@dataclass(frozen=True)
class ByteWeight:
    """A weight W [N, K] of 4-bit codes as gemm_w4a8 reads it (kernels/w4a8_layout.py).

    Attributes:
        packed: uint8 [N, blocks x bytes of a block].
        steps: int32 [groups, N], or [1, N] per channel.
        scale: float32 [N, 1].
        layout: of the bytes.
        columns: K.
    """

    packed: Tensor
    steps: Tensor
    scale: Tensor
    layout: WeightLayout
    columns: int

    def spec(self, dtype: Dtype, x_scale: Tensor, rows: int, epilogue: Epilogue) -> GemmW4A8:
        """The kernel of this weight, for an x of `rows` and a result in `dtype`."""
        act: ActScales = "row" if x_scale.numel() > 1 or rows == 1 else "tensor"
        ragged = self.columns % self.layout.block != 0
        return GemmW4A8(dtype, self.layout.group, self.layout.chunk, act, ragged, **epilogue.spec_fields)


def prepare_w4a8(
    stored: Tensor, scale: Tensor, zero: Tensor | None, group_scale: Tensor | None, form: Format, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A stored weight -> bytes, words of the groups, and scales float32 [N, 1], on its device.

    Args:
        stored: codes [N, ..] as QTensor.stored() packs them.
        scale: [N, 1].
        zero: [N, groups] or [N, 1]; None without zero points.
        group_scale: int8 [N, groups] of a two-level format, or None.
        form: of the codes.
        k: columns.

    Raises:
        ValueError: gemm_w4a8 does not take the format.
    """
    layout = byte_layout_of(form)
    if layout is None:
        raise ValueError(f"{form}: no kernel multiplies 4-bit codes of this format by int8")
    padded_k = -(-k // layout.block) * layout.block
    groups = -(-padded_k // layout.group) if layout.group else 1
    pack = pack_by_kernel if stored.is_cuda else pack_by_torch
    steps = step_words(zero, group_scale, len(stored), groups, stored.device)
    return pack(stored, form, layout, k), steps, scale.float().contiguous()


def linear_w4a8(
    x: Tensor, x_scale: Tensor, weight: ByteWeight, epilogue: Epilogue, dtype: torch.dtype, split_k: int = 0
) -> Tensor:
    """Linear layer with 4-bit weights and int8 activations; integer sums are exact.

    Args:
        x: [M, K] int8.
        x_scale: float32, per token [M] or [M, 1], or one value per tensor.
        weight: of [N, K].
        epilogue: added before rounding.
        dtype: of the result.
        split_k: ranges of K that are summed apart; 0 takes as many as the model of split_k.py says.

    Returns:
        (x W^T) x_scale scale and its epilogue, [M, N].
    """
    m, n = x.shape[0], len(weight.packed)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    if not m or not n:
        return out
    plan = plan_w4a8(gpu(x.device), weight.spec(NAMES[dtype], x_scale, m, epilogue), m, n, weight.columns, split_k)
    added = epilogue.bias, epilogue.residual, epilogue.low, epilogue.up
    with torch.cuda.device(x.get_device()):  # the current one may be another
        return plan.run((x, weight.packed, weight.scale, None, *added, x_scale, weight.steps), out, m, n)


@functools.lru_cache(maxsize=4096)
def plan_w4a8(gpu: Gpu, spec: GemmW4A8, m: int, n: int, k: int, split_k: int = 0) -> GemmPlan:
    """The launches of a linear layer with 4-bit weights and int8 activations.

    Args:
        gpu: that runs them.
        spec: with its epilogue.
        m: rows of x.
        n: output channels.
        k: input channels.
        split_k: as of linear_w4a8.
    """
    launch, blocks = launch_of(spec, _tile_rows(m, spec.low_rank), gpu.capability), -(-k // spec.block)
    split_k = split_k or split_k_of(m, n, -(-k // 128), 4, 1, launch, gpu.multiprocessors)
    split_k = min(blocks, split_k)
    tiles, sizes = tiles_of(m, n, launch), dict(M=m, N=n, K=k, blocks=blocks)
    if split_k == 1:
        return GemmPlan(KernelCall(spec, launch, (tiles,), **sizes), 1, torch.int32, None)
    part = dataclasses.replace(spec, parts=True, bias=False, residual=False, low_rank=0)
    gemm = KernelCall(part, launch, (tiles, split_k), each=-(-blocks // split_k), **sizes)
    sums = SumK(spec.dtype, "int8", spec.act, spec.bias, spec.residual, spec.low_rank)
    return GemmPlan(gemm, split_k, torch.int32, call_of_sum_k(sums, split_k, m, n))


def _tile_rows(m: int, rank: int) -> int:
    """The M that chooses the tile: the factors of a correction of a large rank take registers and shared memory."""
    return m if rank <= 64 else min(m, 128 if rank <= 128 else 32)
