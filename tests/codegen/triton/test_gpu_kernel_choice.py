"""Choices on a GPU that nothing was measured on, and that something was measured on."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.triton.gpu_kernel_choice import choose_experts_kernel, choose_gpu_kernel, without_kernel
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.measured_times import a8_name, remember_times
from qcompile.numerics.format import Format

pytestmark = pytest.mark.usefixtures("own_cache")
INT8 = Format("int8")


def test_nothing_measured_is_not_slower():
    choice = choose_gpu_kernel(Gpu(), INT8, "int8/row", torch.bfloat16, 8, 64, 32)
    assert str(choice) == "gemm_a8 (not measured on this GPU)" and not choice.slower_than_float


def test_a_measured_kernel_below_the_floor_is_slower():
    layer = a8_name("int8", "bf16")
    for kernel, slower in ((1.0, False), (1.06, True)):
        remember_times(Gpu(), layer, 32, 64, 16, {"kernel": kernel, "float": 1.0})
        choice = choose_gpu_kernel(Gpu(), INT8, "int8/row", torch.bfloat16, 8, 64, 32)
        assert choice.slower_than_float == slower and choice.note == f"{1 / kernel:.2f}x cuBLAS"


def test_a_format_without_a_kernel_is_slower_at_any_m():
    for m in (1, 4096):
        choice = choose_gpu_kernel(Gpu(), Format.parse("fp4/group32"), "", torch.bfloat16, m, 64, 32)
        assert str(choice) == "dequantize, then cuBLAS (no kernel for fp4/group32 weights by float x)"
        assert choice.slower_than_float and not choice.has_kernel
    assert without_kernel("why").slower_than_float


def test_groups_and_who_quantizes_x():
    for act, says in (("int4/group128", ""), ("int4/group128/smooth", ", x to int4/group128/smooth by PyTorch")):
        choice = choose_gpu_kernel(Gpu(), Format.parse("int4/group128/zero"), act, torch.bfloat16, 8, 128, 32)
        assert str(choice) == f"gemm_group{says} (not measured on this GPU)"


@pytest.mark.parametrize(
    "form,act,kernel",
    [
        ("int4/group128/zero", "", "gemm_experts"),
        ("int4/group128/zero/dual", "int8/row", "gemm_experts_w4a8"),
        ("int4/group16/zero/dual", "int8/row", "gemm_experts_a8, int8 of dual codes"),
        ("fp8/row", "fp8/row", "gemm_experts_a8"),
    ],
)
def test_stacks_of_experts(form, act, kernel):
    choice = choose_experts_kernel(Gpu(), Format.parse(form), act, torch.bfloat16, 64)
    assert str(choice) == f"{kernel} (not measured on this GPU)" and not choice.slower_than_float
    float32 = choose_experts_kernel(Gpu(), Format.parse(form), act, torch.float32, 64)
    assert float32.note == "no kernel for float32" and not float32.has_kernel
