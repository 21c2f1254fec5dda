"""The operators: their CPU versions compute what the kernels do, and they are well-formed."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, packed_weight, randn, random_epilogue, random_int8

from qcompile.codegen.triton import triton_ops as _register  # noqa: F401
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.gemm import linear_a8, linear_w
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.launch.row_quant import transform_matrices
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

ops = torch.ops.qcompile_triton
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the operators run the kernels there")


@interpreted
@pytest.mark.parametrize(
    "form", ["int4/group128/zero", "int3/group64", "int4/group64/floatzero", "int4/group64/zero/dual"]
)
def test_the_cpu_version_of_linear_w_is_what_the_kernel_computes(form):
    weight, _ = packed_weight(form, 40, 272)
    x = randn(7, 272, dtype=torch.float16)
    e = random_epilogue(("bias", "residual", "low", "up"), 7, 40, 5, torch.float16)
    got = ops.linear_w(x, weight.packed, weight.scale, weight.zero, e.bias, e.residual, e.low, e.up, form, 272)
    assert torch.allclose(got, linear_w(x, weight, e), rtol=2e-3, atol=2e-2)


@interpreted
def test_the_cpu_version_of_linear_a8_is_what_the_kernel_computes():
    x, w = random_int8((7, 96), (40, 96))
    x_scale, scale = randn(7, 1).abs() / 99, randn(40, 1, seed=6).abs() / 99
    e = random_epilogue(("bias", "residual", "low", "up"), 7, 40, 5, torch.float16)
    got = ops.linear_a8(x, x_scale, w, scale, e.bias, e.residual, e.low, e.up, torch.float16)
    assert torch.allclose(got, linear_a8(x, x_scale, w, scale, e, torch.float16), rtol=2e-3, atol=2e-2)


def arguments(op):
    torch.manual_seed(0)
    if op == "linear_w":
        form = Format.parse("int4/group32/zero")
        packed, scale, zero = prepare(*quantize_tensor(torch.randn(24, 64), form).stored_parts, form, 64, torch.float16)
        epilogue = torch.randn(24), torch.randn(2, 3, 24), torch.randn(2, 3, 4), torch.randn(24, 4)
        return (torch.randn(2, 3, 64), packed, scale, zero, *epilogue, str(form), 64)
    if op == "linear_a8":
        x, w = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((2, 3, 64), (24, 64)))
        return (x, torch.rand(2, 3, 1), w, torch.rand(24, 1), torch.randn(24), None, None, None, torch.float16)
    x, ones = torch.randn(2, 3, 64).half(), torch.ones(64)
    spec = "row_quant/fp16/first=rms/residual/value/hadamard=64"
    sides = transform_matrices(RowQuant(hadamard=64), x.device)
    return (x, x, None, ones, None, None, ones, *sides, 1e-5, spec)


@pytest.mark.parametrize("op", ["linear_w", "linear_a8", "row_quant"])
def test_opcheck(op):
    torch.library.opcheck(getattr(ops, op), arguments(op))
