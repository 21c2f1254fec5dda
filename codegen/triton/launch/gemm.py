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
    GemvW,
    KernelSpec,
    SumK,
    WeightFields,
    Zero,
)
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.launch.measured_times import GEMV_MAX_M, Variant, dequantizes, weight_only_name
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, place_scales, split_k_of, tiles_of
from qcompile.codegen.triton.launch.tuning_cache import launch_for


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
        packed: uint8 [N, blocks x bytes of a block].
        scale: float32 [groups, N].
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
        points: Zero = "none" if self.zero is None else "float" if self.zero.is_floating_point() else "int"
        ragged = self.columns % self.layout.block != 0
        bits, chunk, group = self.layout.bits, self.layout.chunk, self.layout.group
        return dict(bits=bits, group=group, zero=points, chunk=chunk, ragged=ragged)

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
    dtype = NAMES[x.dtype]
    if m == 0:
        return x.new_empty(0, n)
    if variant is None:
        layer = weight_only_name(weight.layout.bits, weight.layout.group, weight.spec_fields["zero"], dtype)
        variant = "dequant" if dequantizes(gpu(x.device), layer, n, weight.columns, m) else "kernel"
    if variant == "dequant":
        return _by_cublas(x, weight, epilogue)
    if m <= GEMV_MAX_M:
        return _gemv(x, weight, epilogue)
    spec = place_scales(GemmW(dtype, **weight.spec_fields, **epilogue.spec_fields), m)
    launch = launch or launch_for(gpu(x.device), spec, n, weight.columns, m)
    split_k = split_k_of(m, n, weight.blocks, launch, gpu(x.device).multiprocessors)
    out = x.new_empty(m, n)
    tiles = tiles_of(m, n, launch)
    arguments = weight.arguments | epilogue.tensors | dict(x=x, M=m)
    if split_k == 1:
        run(spec, (tiles,), launch, **arguments, out=out)
        return out
    blocks_of_part = -(-weight.blocks // split_k)
    spec = dataclasses.replace(spec, parts=True, bias=False, residual=False)
    sums = x.new_empty(split_k, m, n, dtype=torch.float32)
    run(spec, (tiles, split_k), launch, **arguments, out=sums, each=blocks_of_part)
    return sum_k(sums, out, SumK(dtype, **epilogue.sum_k_fields), **epilogue.tensors)


def _gemv(x: Tensor, weight: PackedWeight, epilogue: Epilogue) -> Tensor:
    spec = GemvW(NAMES[x.dtype], **weight.spec_fields, rows=len(x), **epilogue.spec_fields)
    launch = launch_of(spec)
    out = x.new_empty(len(x), len(weight.packed))
    grid = (-(-out.shape[1] // launch.block_n),)
    run(spec, grid, launch, x=x, out=out, **weight.arguments, **epilogue.tensors)
    return out


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


def sum_k(sums: Tensor, out: Tensor, spec: SumK, **arguments: Tensor) -> Tensor:
    """Add the partial sums [split_k, M, N] of a split-K GEMM into out [M, N]."""
    launch, (split_k, m, n) = launch_of(spec), sums.shape
    run(spec, (m, -(-n // launch.block_n)), launch, sums=sums, out=out, M=m, N=n, parts=split_k, **arguments)
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
    m, k = x.shape
    n = len(weight)
    if m == 0:
        return x.new_empty(0, n, dtype=dtype)
    codes: GemmCodes = "int8" if x.dtype == torch.int8 else "fp8"
    act: ActScales = "row" if x_scale.numel() > 1 or m == 1 else "tensor"
    spec = Gemm8(NAMES[dtype], codes, act, **epilogue.spec_fields)
    launch = launch_for(gpu(x.device), spec, n, k, m)
    steps = -(-k // launch.block_k)
    split_k = 1 if epilogue.up is not None else split_k_of(m, n, steps, launch, gpu(x.device).multiprocessors)
    spec = dataclasses.replace(spec, ragged=k % launch.block_k != 0)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    tiles = tiles_of(m, n, launch)
    arguments = epilogue.tensors | dict(x=x, w=weight, x_scale=x_scale, scale=scale, M=m, N=n, K=k)
    if split_k == 1:
        run(spec, (tiles,), launch, **arguments, out=out)
        return out
    columns_of_part = -(-k // (split_k * launch.block_k)) * launch.block_k
    spec = dataclasses.replace(spec, parts=True, bias=False, residual=False)
    sums = torch.empty(split_k, m, n, dtype=torch.int32 if codes == "int8" else torch.float32, device=x.device)
    run(spec, (tiles, split_k), launch, **arguments, out=sums, each=columns_of_part)
    sum_spec = SumK(NAMES[dtype], codes, act, **epilogue.sum_k_fields)
    return sum_k(sums, out, sum_spec, x_scale=x_scale, scale=scale, **epilogue.tensors)
