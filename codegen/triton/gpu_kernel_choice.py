"""Which kernel computes a site on a GPU, how its speed compares with float, and whether that was measured.

Times are those of `qcompile kernels tune` on this GPU (launch/measured_times.py). Where there are none, a site with a
kernel is quantized and says that it was not measured. A format without a kernel is dequantized before every matmul,
which reads more than the float matmul does, at any M: slower.
"""

from __future__ import annotations

import torch

from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.codegen.triton.kernels.dtypes import NAMES
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.kernel_support import (
    codes_of,
    experts_operator_for,
    operator_for,
    row_quant_codes,
    why_no_experts_kernel,
    why_no_kernel,
)
from qcompile.codegen.triton.launch.measured_times import (
    Variant,
    a8_name,
    dequantizes,
    group_name,
    measured_times,
    w4a8_name,
    weight_only_name,
)
from qcompile.codegen.triton.launch.pack_weights import zero_points_of
from qcompile.numerics.format import Format


def without_kernel(reason: str) -> KernelChoice:
    """The choice where there is no kernel, and why."""
    return KernelChoice("dequantize, then cuBLAS", note=reason, has_kernel=False)


def choose_experts_kernel(gpu: Gpu, form: Format, act: str, dtype: torch.dtype, k: int) -> KernelChoice:
    """The kernel of rows sorted by expert times a stack of weights; nothing measures it yet.

    Args:
        gpu: that runs it.
        form: format of the stack.
        act: format of the rows, "" where they are float.
        dtype: of the model.
        k: input channels.
    """
    operator = experts_operator_for(form, act, dtype, k, gpu.capability)
    if operator is None:
        return without_kernel(why_no_experts_kernel(form, act, dtype, k, gpu.capability))
    kernel = {"experts_w": "gemm_experts", "experts_w4a8": "gemm_experts_w4a8"}.get(operator, "gemm_experts_a8")
    if operator == "experts_a8" and form.dual:
        kernel += ", int8 of dual codes"
    return KernelChoice(kernel, None, "not measured on this GPU")


def choose_gpu_kernel(gpu: Gpu, form: Format, act: str, dtype: torch.dtype, m: int, k: int, n: int) -> KernelChoice:
    """The kernel of x [M, K] times a weight [N, K] on a GPU, and how fast it was measured to be.

    Args:
        gpu: whose measurements count.
        form: format of the weight.
        act: format of x, "" where it is float.
        dtype: of the model.
        m: rows of x.
        k: input channels.
        n: output channels.
    """
    operator = operator_for(form, act, dtype, gpu.capability)
    if operator is None:
        return without_kernel(why_no_kernel(form, act, dtype, gpu.capability))
    variant: Variant = "kernel"
    if operator == "linear_w4a8":
        layer, kernel = w4a8_name(form.group, NAMES[dtype]), "gemm_w4a8"
    elif operator == "linear_group":
        layer = group_name(form.dtype, form.group, act, NAMES[dtype])
        kernel = "gemm_fp4_fp8" if form.dtype == "fp4" else "gemm_group"
    elif operator == "linear_a8":
        layer = a8_name(codes_of(form), NAMES[dtype])
        kernel = "gemm_a8" + ", int8 of dual codes" * form.dual
    else:
        layer = weight_only_name(form.bits, form.group, zero_points_of(form, dtype), NAMES[dtype])
        kernel = "gemm_w"
        if dequantizes(gpu, layer, n, k, m):
            variant, kernel = "dequant", "dequant, then cuBLAS"
    if operator == "linear_group" and row_quant_codes(Format.parse(act)) is None:
        kernel += f", x to {act} by PyTorch"
    times = measured_times(gpu, layer, n, k, m)
    if "float" not in times or variant not in times:
        return KernelChoice(kernel, None, "not measured on this GPU")
    ratio = times["float"] / times[variant]
    return KernelChoice(kernel, ratio, f"{ratio:.2f}x cuBLAS")
