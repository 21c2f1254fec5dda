"""Run the kernels of a product: which one for how many rows, its grid, and its parts."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.jit import kernel
from qcompile.codegen.triton.kernels.spec import Dequant, Gemm8, GemmW, GemvW, KernelSpec, SumK, Zero
from qcompile.codegen.triton.kernels.weight_layout import WeightLayout
from qcompile.codegen.triton.launch.measured_times import FEW, Way, by_numbers, dequantizes
from qcompile.codegen.triton.launch.tiles import Launch, launch_of, parts_of, scaled
from qcompile.codegen.triton.launch.tuning_cache import launch_for


@dataclass(frozen=True)
class Epilogue:
    """What is added to a product before it is rounded: bias [N], residual [M, N], low [M, R] @ up [N, R]^T."""

    bias: Tensor | None = None
    residual: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None

    @property
    def parts(self) -> dict[str, Tensor]:
        """Those that are there, by the names of a kernel's arguments."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def flags(self) -> dict[str, Any]:
        """Fields of a spec."""
        rank = 0 if self.up is None else self.up.shape[1]
        return dict(bias=self.bias is not None, residual=self.residual is not None, low_rank=rank)

    @property
    def later(self) -> dict[str, bool]:
        """Fields of the sum_k behind a product in parts."""
        return dict(bias=self.bias is not None, residual=self.residual is not None)


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight (weight_layout.py): bytes [N, ..], scales and zero points [groups, N]."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    layout: WeightLayout
    columns: int

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of a spec."""
        points: Zero = "none" if self.zero is None else "float" if self.zero.is_floating_point() else "int"
        ragged = self.columns % self.layout.block != 0
        bits, chunk, group = self.layout.bits, self.layout.chunk, self.layout.group
        return dict(bits=bits, group=group, zero=points, chunk=chunk, ragged=ragged)

    @property
    def tensors(self) -> dict[str, Any]:
        """Arguments of a kernel."""
        found = dict(w=self.packed, scale=self.scale, N=len(self.packed), K=self.columns)
        found["blocks"] = -(-self.columns // self.layout.block)
        return found if self.zero is None else found | dict(zero=self.zero)


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The GPU that a tensor is on."""
    if device.type != "cuda":
        return Gpu()
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, found.multi_processor_count, (found.major, found.minor))


def run(spec: KernelSpec, grid: tuple[int, ...], how: Launch, **arguments: Any) -> None:
    """Run a kernel with those of the arguments that it has."""
    found = kernel(spec)
    names = found.arg_names
    given = {name: arguments[name] for name in names if name in arguments}
    with torch.cuda.device_of(arguments["out"]):  # the current one may be another
        found[grid](**given, **how.constants(names), num_warps=how.warps, num_stages=how.stages)


def linear_w(
    x: Tensor, weight: PackedWeight, more: Epilogue, how: Launch | None = None, way: Way | None = None
) -> Tensor:
    """x [M, K] bf16 or fp16 @ W^T and its epilogue -> [M, N] in x's dtype.

    Args:
        how: sizes of gemm_w; None takes those that were measured, or the table's.
        way: kernel or dequant; None takes the one that was measured to be faster for these rows, or the rule's.
    """
    m, n = x.shape[0], len(weight.packed)
    dtype = NAMES[x.dtype]
    if m == 0:
        return x.new_empty(0, n)
    if way is None:
        product = by_numbers(weight.layout.bits, weight.layout.group, weight.fields["zero"], dtype)
        way = "dequant" if dequantizes(gpu(x.device), product, n, weight.columns, m) else "kernel"
    if way == "dequant":
        return _by_cublas(x, weight, more)
    if m <= FEW:
        return _gemv(x, weight, more)
    spec = scaled(GemmW(dtype, **weight.fields, **more.flags), m)
    how = how or launch_for(gpu(x.device), spec, n, weight.columns, m)
    parts = parts_of(m, n, weight.tensors["blocks"], how, gpu(x.device).multiprocessors)
    out = x.new_empty(m, n)
    tiles = -(-m // how.rows) * -(-n // how.channels)
    arguments = weight.tensors | more.parts | dict(x=x, M=m)
    if parts == 1:
        run(spec, (tiles,), how, **arguments, out=out)
        return out
    each = -(-weight.tensors["blocks"] // parts)
    spec = dataclasses.replace(spec, parts=True, bias=False, residual=False)
    sums = x.new_empty(parts, m, n, dtype=torch.float32)
    run(spec, (tiles, parts), how, **arguments, out=sums, each=each)
    return sum_parts(sums, out, SumK(dtype, **more.later), **more.parts)


def _gemv(x: Tensor, weight: PackedWeight, more: Epilogue) -> Tensor:
    spec = GemvW(NAMES[x.dtype], **weight.fields, rows=len(x), **more.flags)
    how = launch_of(spec)
    out = x.new_empty(len(x), len(weight.packed))
    run(spec, (-(-out.shape[1] // how.channels),), how, x=x, out=out, **weight.tensors, **more.parts)
    return out


def _by_cublas(x: Tensor, weight: PackedWeight, more: Epilogue) -> Tensor:
    out = torch.nn.functional.linear(x, dequantize(weight, x.dtype), more.bias)
    if more.low is not None and more.up is not None:
        out = out + more.low @ more.up.t()
    return out if more.residual is None else out + more.residual


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The numbers of W, [N, K]."""
    spec = Dequant(NAMES[dtype], **weight.fields)
    how, n = launch_of(spec), len(weight.packed)
    out = torch.empty(n, weight.columns, dtype=dtype, device=weight.packed.device)
    run(spec, (min(8, weight.tensors["blocks"]), -(-n // how.channels)), how, out=out, **weight.tensors)
    return out


def sum_parts(sums: Tensor, out: Tensor, spec: SumK, **arguments: Tensor) -> Tensor:
    """Sum the parts [P, M, N] of a product into out [M, N]."""
    how, (parts, m, n) = launch_of(spec), sums.shape
    run(spec, (m, -(-n // how.channels)), how, sums=sums, out=out, M=m, N=n, parts=parts, **arguments)
    return out


def linear_a8(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, more: Epilogue, dtype: torch.dtype) -> Tensor:
    """x [M, K] int8 or fp8 with x_scale [M, 1] (or one), W [N, K] alike with scale [N, 1] -> [M, N] in dtype."""
    m, k = x.shape
    n = len(weight)
    if m == 0:
        return x.new_empty(0, n, dtype=dtype)
    codes = "int8" if x.dtype == torch.int8 else "fp8"
    act = "row" if x_scale.numel() > 1 or m == 1 else "tensor"
    spec = Gemm8(NAMES[dtype], codes, act, **more.flags)
    how = launch_for(gpu(x.device), spec, n, k, m)
    parts = 1 if more.up is not None else parts_of(m, n, -(-k // how.columns), how, gpu(x.device).multiprocessors)
    spec = dataclasses.replace(spec, ragged=k % how.columns != 0)
    out = torch.empty(m, n, dtype=dtype, device=x.device)
    tiles = -(-m // how.rows) * -(-n // how.channels)
    arguments = more.parts | dict(x=x, w=weight, x_scale=x_scale, scale=scale, M=m, N=n, K=k)
    if parts == 1:
        run(spec, (tiles,), how, **arguments, out=out)
        return out
    each = -(-k // (parts * how.columns)) * how.columns
    spec = dataclasses.replace(spec, parts=True, bias=False, residual=False)
    sums = torch.empty(parts, m, n, dtype=torch.int32 if codes == "int8" else torch.float32, device=x.device)
    run(spec, (tiles, parts), how, **arguments, out=sums, each=each)
    return sum_parts(
        sums, out, SumK(NAMES[dtype], codes, act, **more.later), x_scale=x_scale, scale=scale, **more.parts
    )
