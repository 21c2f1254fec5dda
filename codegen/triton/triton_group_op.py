"""qcompile_triton::linear_group, the kernels of 4-bit weights with scales of groups by 8-bit codes of activations.

As the operators of triton_ops.py: on CUDA the kernel, on a CPU its own definition in plain torch. Beside it `centered`,
which makes of activations with zero points what the kernel multiplies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.codegen.triton.decided_calls import decided, dense, on_device
from qcompile.codegen.triton.define_op import TritonOp
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.group_layout import split_words
from qcompile.codegen.triton.kernels.weight_layout import unpack_weight
from qcompile.codegen.triton.launch.gemm import gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.launch.group_gemm import GroupWeight, plan_group
from qcompile.codegen.triton.triton_group_checks import check_centered, check_linear_group
from qcompile.codegen.triton.triton_ops import add_epilogue, epilogue_of
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1
from qcompile.numerics.qtensor import expand_groups


@TritonOp
def linear_group(
    x: Tensor, x_scale: Tensor, packed: Tensor, words: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, act: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Sum of (x_g W_g^T) x_scale scale_g over groups g [+ low up^T] [+ bias] [+ residual], rounded once.

    Args:
        x: [.., K] int8, codes less their zero points; or fp8 codes, by fp4 weights.
        x_scale: float32 as `act` says: [.., 1], [.., groups], or one value.
        packed: of W [N, K], as prepare_group makes it.
        words: of the groups, as prepare_group makes them.
        bias: [N].
        residual: [.., N].
        low: [.., R].
        up: [N, R].
        format: of the weight.
        act: of x.
        columns: K.
        dtype: of the result.

    Returns:
        [.., N].
    """

    def decide() -> tuple[GemmPlan | None, int, int]:
        layout = check_linear_group(x, x_scale, packed, words, bias, residual, low, up, format, act, columns, dtype)
        weight, m, n = GroupWeight(packed, words, layout, columns), math.prod(x.shape[:-1]), packed.shape[0]
        spec = weight.spec(NAMES[dtype], Format.parse(act), epilogue_of(bias, residual, low, up))
        return plan_group(gpu(x.device), spec, m, n, columns) if m and n else None, m, n

    tensors = dense(x, packed, words, None, bias, residual, low, up, x_scale, words)
    plan, m, n = decided(tensors, ("linear_group", format, act, columns, dtype), decide)
    out = x.new_empty(*x.shape[:-1], n, dtype=dtype)
    if plan is None:
        return out
    with on_device(x):
        return plan.run(tensors, out, m, n)


@linear_group.on_cpu
def _(
    x: Tensor, x_scale: Tensor, packed: Tensor, words: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, act: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    layout = check_linear_group(x, x_scale, packed, words, bias, residual, low, up, format, act, columns, dtype)
    codes, form = unpack_weight(packed, layout, columns), Format.parse(format)
    scales, zeros = split_words(words, form)
    of_groups = Format.parse(act).per == "group"
    total = torch.zeros(*x.shape[:-1], len(packed), dtype=torch.float32)
    for group, start in enumerate(range(0, columns, layout.group)):
        part = slice(start, min(start + layout.group, columns))
        w = decode_e2m1(codes[:, part]) if form.is_float else codes[:, part].int() - zeros[group, :, None]
        sums = (x[..., part].double() @ w.double().t()).float()  # of integers exact, as int32 is
        sums = sums * scales[group]
        total = total + (sums * x_scale[..., group, None] if of_groups else sums)
    return add_epilogue(total if of_groups else total * x_scale, bias, residual, low, up).to(dtype)


@linear_group.on_fake
def _(
    x: Tensor, x_scale: Tensor, packed: Tensor, words: Tensor, bias: Tensor | None, residual: Tensor | None,
    low: Tensor | None, up: Tensor | None, format: str, act: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_linear_group(x, x_scale, packed, words, bias, residual, low, up, format, act, columns, dtype)
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=dtype)


@TritonOp
def centered(codes: Tensor, zero: Tensor, format: str) -> Tensor:
    """Codes of activations less their zero points, int8; where row_quant quantizes them, it writes these itself.

    Args:
        codes: [.., K] uint8 of an int4 format with zero points.
        zero: float32 [.., 1] or [.., groups] of integers.
        format: of the codes.

    Returns:
        int8 [.., K], -15 .. 15.
    """
    form = check_centered(codes, zero, format)
    return (codes.to(torch.int8) - expand_groups(zero.to(torch.int8), form, codes.shape[-1])).contiguous()


centered.on_cpu(centered.on_cuda)


@centered.on_fake
def _(codes: Tensor, zero: Tensor, format: str) -> Tensor:
    check_centered(codes, zero, format)
    return codes.new_empty(codes.shape, dtype=torch.int8)
