"""qcompile_triton::linear_w4a8, the kernel of 4-bit weights and int8 activations as an operator of torch.

As the operators of triton_ops.py: on CUDA the kernel, on a CPU its own definition in plain torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.codegen.triton.decided_calls import decided, dense, on_device
from qcompile.codegen.triton.define_op import TritonOp
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.w4a8_layout import int8_values
from qcompile.codegen.triton.kernels.weight_layout import unpack_weight
from qcompile.codegen.triton.launch.gemm import gpu
from qcompile.codegen.triton.launch.gemm_plan import GemmPlan
from qcompile.codegen.triton.launch.w4a8 import ByteWeight, plan_w4a8
from qcompile.codegen.triton.triton_op_checks import check_linear_w4a8
from qcompile.codegen.triton.triton_ops import add_epilogue, epilogue_of


@TritonOp
def linear_w4a8(
    x: Tensor, x_scale: Tensor, packed: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, low: Tensor | None, up: Tensor | None, format: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """(x W^T) x_scale scale [+ low up^T] [+ bias] [+ residual], rounded once; W the integers of 4-bit codes.

    Args:
        x: [.., K] int8.
        x_scale: per token [.., 1], or one value per tensor.
        packed: of W [N, K], as prepare_w4a8 makes it.
        steps: int32 words of the groups, as prepare_w4a8 makes them.
        scale: per channel [N, 1].
        bias: [N].
        residual: [.., N].
        low: [.., R].
        up: [N, R].
        format: of the codes: int4 with two-level scales, or per channel.
        columns: K.
        dtype: of the result.

    Returns:
        [.., N].
    """

    def decide() -> tuple[GemmPlan | None, int, int]:
        layout = check_linear_w4a8(x, x_scale, packed, steps, scale, bias, residual, low, up, format, columns, dtype)
        weight, m, n = ByteWeight(packed, steps, scale, layout, columns), math.prod(x.shape[:-1]), packed.shape[0]
        spec = weight.spec(NAMES[dtype], x_scale, m, epilogue_of(bias, residual, low, up))
        return plan_w4a8(gpu(x.device), spec, m, n, columns) if m and n else None, m, n

    tensors = dense(x, packed, scale, None, bias, residual, low, up, x_scale, steps)
    plan, m, n = decided(tensors, ("linear_w4a8", format, columns, dtype), decide)
    out = x.new_empty(*x.shape[:-1], n, dtype=dtype)
    if plan is None:
        return out
    with on_device(x):
        return plan.run(tensors, out, m, n)


@linear_w4a8.on_cpu
def _(
    x: Tensor, x_scale: Tensor, packed: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, low: Tensor | None, up: Tensor | None, format: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    layout = check_linear_w4a8(x, x_scale, packed, steps, scale, bias, residual, low, up, format, columns, dtype)
    integers = int8_values(unpack_weight(packed, layout, columns), steps, layout)
    sums = (x.double() @ integers.double().t()).float()  # exact, as int32 is
    return add_epilogue(sums * x_scale * scale.reshape(-1), bias, residual, low, up).to(dtype)


@linear_w4a8.on_fake
def _(
    x: Tensor, x_scale: Tensor, packed: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None,
    residual: Tensor | None, low: Tensor | None, up: Tensor | None, format: str, columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_linear_w4a8(x, x_scale, packed, steps, scale, bias, residual, low, up, format, columns, dtype)
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=dtype)
