"""Random stacks of expert weights for gemm_experts, rows for them, and the product in float64."""

from __future__ import annotations

import torch
from kernel_cases import DEVICE, randn

from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.kernels.weight_layout import layout_of
from qcompile.codegen.triton.launch.experts import prepare_experts
from qcompile.codegen.triton.launch.gemm import PackedWeight
from qcompile.codegen.triton.launch.quantized_experts import prepare_experts_a8, prepare_experts_w4a8
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import dequantize_to_int8
from qcompile.numerics.rounding import quantize_tensor

FORMS = ["int4/group128/zero", "int4/group64", "int4/group32/zero", "int8/row", "int4/row/zero", "int3/group64/zero",
         "int2/group64/zero", "int4/group64/floatzero", "int4/group128/zero/dual"]  # fmt: skip


QUANTIZED = [
    ("int8/row", "int8"), ("fp8/row", "fp8"), ("int4/group64/zero/dual", "int8"), ("int4/group32/dual", "int8"),
    ("int4/row/zero", "int8"), ("int4/row", "int8"), ("int4/group256/dual", "int8"), ("int4/group24/zero/dual", "int8"),
]  # fmt: skip
"""Formats of stacks and of rows; the last stack becomes int8, as its groups are none of gemm_w4a8."""


def quantized_stack(form, experts, n, k, seed=1):
    """A stack as the kernels of quantized rows read it, its integers (or fp8 values) [E, N, K], and its scales [E, N].

    The first is the arguments of experts_w4a8 or of experts_a8 behind `ends`, up to `dtype`.
    """
    form = Format.parse(form)
    q = quantize_tensor(randn(experts, n, k, seed=seed).cpu(), form)
    parts = [None if t is None else t.to(DEVICE) for t in q.stored_parts]
    if byte_layout_of(form) is not None:
        arguments = *prepare_experts_w4a8(*parts, form, k), str(form), k
    else:
        arguments = prepare_experts_a8(*parts, form, k)
    if form.dual:
        values = dequantize_to_int8(q.codes, q.zero, q.group_scale, form)
    else:
        values = q.codes.double() - (q.zero if q.zero is not None else 0)
    return arguments, values.to(DEVICE).double(), q.scale.squeeze(-1).to(DEVICE)


def quantized_rows(act, rows, k, seed=0):
    """Random rows as codes, and their scales [T, 1]."""
    q = quantize_tensor(randn(rows, k, seed=seed).cpu(), Format.parse(act))
    return q.codes.to(DEVICE), q.scale.to(DEVICE)


def expert_stack(form, experts, n, k, dtype=torch.float16, seed=1):
    """A stack for gemm_experts, and its dequantized values [E, N, K] in float64."""
    q = quantize_tensor(randn(experts, n, k, seed=seed).cpu(), Format.parse(form))
    parts = prepare_experts(*(None if t is None else t.to(DEVICE) for t in q.stored_parts), q.format, k, dtype)
    return PackedWeight(*parts, layout_of(q.format), k), q.dequantize(torch.float64).to(DEVICE)


def expert_product(x, ends, values):
    """Rows of x [S, K] by the weights of their experts, float64 [S, N]; zeros behind the last end."""
    out = torch.zeros(len(x), values.shape[1], dtype=torch.float64, device=x.device)
    first = 0
    for expert, last in enumerate(ends.tolist()):
        out[first:last] = x[first:last].double() @ values[expert].t()
        first = last
    return out


def ends_of(counts, dtype=torch.int32):
    return torch.tensor(counts).cumsum(0).to(dtype).to(DEVICE)
