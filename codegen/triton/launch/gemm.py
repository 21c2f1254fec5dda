"""Run the kernels of a linear layer: which one for which M, its grid, and split-K."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import (
    ActScales,
    Dequant,
    Gemm8,
    GemmCodes,
    GemmW,
    KernelSpec,
    WeightFields,
    Zero,
)
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan, plan_8_bit, plan_weight_only
from qcompile.codegen.triton.launch.kernel_call import INTERPRETED
from qcompile.codegen.triton.launch.measured_times import Variant, dequantizes, weight_only_name
from qcompile.codegen.triton.launch.tiles import Launch, launch_of


class SumKFields(TypedDict):
    """Fields of the spec of sum_k that an epilogue decides."""

    bias: bool
    residual: bool


class EpilogueFields(SumKFields):
    """Fields of the spec of a GEMM that an epilogue decides."""

    low_rank: int


@dataclass(frozen=True)
class Epilogue:
    """What is added to the sums before they are rounded: bias [N], residual [M, N], low [M, R] @ up [N, R]^T."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by the names of a kernel's arguments."""
        by_name = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in by_name.items() if tensor is not None}

    @property
    def spec_fields(self) -> EpilogueFields:
        """Fields of the spec of a GEMM with this epilogue."""
        return {**self.sum_k_fields, "low_rank": 0 if self.up is None else self.up.shape[1]}

    @property
    def sum_k_fields(self) -> SumKFields:
        """Fields of the spec of sum_k behind a split-K GEMM."""
        return dict(bias=self.bias is not None, residual=self.residual is not None)


@dataclass(frozen=True)
class PackedWeight:
    """A weight W [N, K] as the kernels read it (weight_layout.py).

    Attributes:
        packed: words [N, blocks x words of a block], uint8 or int16.
        scale: float32 [groups, N], or int32 where each holds the zero point too (weight_layout.join_scales).
        zero: [groups, N], or None.
        layout: of the bytes.
        columns: K.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    layout: WeightLayout
    columns: int

    @property
    def blocks(self) -> int:
        """Blocks of packed columns along K."""
        return -(-self.columns // self.layout.block)

    @property
    def spec_fields(self) -> WeightFields:
        """Fields of the spec of a kernel that reads this weight."""
        paired = not self.scale.is_floating_point()
        points: Zero = "none" if self.zero is None else "float" if self.zero.is_floating_point() else "int"
        ragged = self.columns % self.layout.block != 0
        bits, chunk, group = self.layout.bits, self.layout.chunk, self.layout.group
        return dict(bits=bits, group=group, zero="int" if paired else points, chunk=chunk, paired=paired, ragged=ragged)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a kernel."""
        found = dict(w=self.packed, scale=self.scale, N=len(self.packed), K=self.columns, blocks=self.blocks)
        return found if self.zero is None else found | dict(zero=self.zero)


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU that a tensor is on."""
    if device.type != "cuda":
        return Gpu()
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, found.multi_processor_count, (found.major, found.minor))


def run(spec: KernelSpec, grid: tuple[int, ...], launch: Launch, **arguments: Any) -> None:
    """Run a kernel with those of the arguments that it has."""
    function = kernel(spec)
    names = function.arg_names
    own = {name: arguments[name] for name in names if name in arguments}
    own |= {"ASM": not INTERPRETED} if "ASM" in names else {}
    with torch.cuda.device(arguments["out"].get_device()):  # the current one may be another
        function[grid](**own, **launch.constants(names), num_warps=launch.num_warps, num_stages=launch.num_stages)


def linear_w(
    x: Tensor, weight: PackedWeight, epilogue: Epilogue, launch: Launch | None = None, variant: Variant | None = None
) -> Tensor:
    """Weight-only linear layer.

    Args:
        x: [M, K] bf16 or fp16.
        weight: of [N, K].
        epilogue: added before rounding.
        launch: of gemm_w; None takes the measured one, or the table's.
        variant: kernel or dequant; None takes the one that was measured to be faster at this M, or the rule's.

    Returns:
        x W^T and its epilogue, [M, N] in x's dtype.
    """
    m, n = x.shape[0], len(weight.packed)
    plan = None if variant == "dequant" else plan_linear_w(x, m, weight, epilogue, launch, variant)
    if plan is None:
        return _by_cublas(x, weight, epilogue) if m else x.new_empty(m, n)
    added = epilogue.bias, epilogue.residual, epilogue.low, epilogue.up
    with torch.cuda.device(x.get_device()):  # the current one may be another
        return plan.run((x, weight.packed, weight.scale, weight.zero, *added, None, None), x.new_empty(m, n), m, n)


def plan_linear_w(
    x: Tensor, m: int, weight: PackedWeight, epilogue: Epilogue, launch: Launch | None = None,
    variant: Variant | None = None,
) -> GemmPlan | None:  # fmt: skip
    """The launches of linear_w; None without rows, and where cuBLAS multiplies by the dequantized weight."""
    spec = GemmW(NAMES[x.dtype], **weight.spec_fields, **epilogue.spec_fields)
    n, k, found = len(weight.packed), weight.columns, gpu(x.device)
    layer = weight_only_name(spec.bits, spec.group, spec.zero, spec.dtype)
    if not m or not n or (variant is None and dequantizes(found, layer, n, k, m)):
        return None
    return plan_weight_only(found, spec, m, n, k, launch)


def _by_cublas(x: Tensor, weight: PackedWeight, epilogue: Epilogue) -> Tensor:
    out = torch.nn.functional.linear(x, dequantize(weight, x.dtype), epilogue.bias)
    if epilogue.low is not None and epilogue.up is not None:
        out = out + epilogue.low @ epilogue.up.t()
    return out if epilogue.residual is None else out + epilogue.residual


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dequantized values of W, [N, K]."""
    spec = Dequant(NAMES[dtype], **weight.spec_fields)
    launch, n = launch_of(spec), len(weight.packed)
    out = torch.empty(n, weight.columns, dtype=dtype, device=weight.packed.device)
    run(spec, (min(8, weight.blocks), -(-n // launch.block_n)), launch, out=out, **weight.arguments)
    return out


def linear_a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, epilogue: Epilogue, dtype: torch.dtype
) -> Tensor:
    """Linear layer with 8-bit codes on both sides.

    Args:
        x: [M, K] int8 or fp8.
        x_scale: per token [M, 1], or one value per tensor.
        weight: [N, K] of x's dtype.
        scale: per channel [N, 1].
        epilogue: added before rounding.
        dtype: of the result.

    Returns:
        [M, N].
    """
    m, n = x.shape[0], len(weight)
    out, plan = x.new_empty(m, n, dtype=dtype), plan_linear_a8(x, m, x_scale, n, epilogue, dtype)
    if plan is None:
        return out
    added = epilogue.bias, epilogue.residual, epilogue.low, epilogue.up
    with torch.cuda.device(x.get_device()):  # the current one may be another
        return plan.run((x, weight, scale, None, *added, x_scale, None), out, m, n)


def plan_linear_a8(
    x: Tensor, m: int, x_scale: Tensor, n: int, epilogue: Epilogue, dtype: torch.dtype
) -> GemmPlan | None:
    """The launches of linear_a8 for x [.., K] of M rows; None without rows."""
    if not m or not n:
        return None
    codes: GemmCodes = "int8" if x.dtype == torch.int8 else "fp8"
    act: ActScales = "row" if x_scale.numel() > 1 or m == 1 else "tensor"
    return plan_8_bit(gpu(x.device), Gemm8(NAMES[dtype], codes, act, **epilogue.spec_fields), m, n, x.shape[-1])
