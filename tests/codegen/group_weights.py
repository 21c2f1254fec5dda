"""Random weights of gemm_group and gemm_fp4_fp8, activations for them, and what both stand for."""

from __future__ import annotations

import torch
from kernel_cases import DEVICE, randn

from qcompile.codegen.triton.kernels.group_layout import group_layout_of
from qcompile.codegen.triton.launch.group_gemm import GroupWeight, prepare_group
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor

PAIRS = [
    ("int4/group128/zero", "int4/group128"), ("int4/group128/zero", "int4/row"), ("int4/group128", "int8/row"),
    ("int4/group128", "int4/group128"), ("int4/group64/zero", "int4/group64"), ("int4/group32", "int8/tensor"),
    ("int4/group32/zero", "int4/group32"), ("int4/group256/zero", "int4/group128"), ("int4/group256", "int4/row"),
    ("int4/group192/zero", "int8/row"), ("int4/row/zero", "int4/group64"), ("int4/row", "int4/group128"),
    ("int4/group128/zero", "int4/group128/zero"), ("int4/group128/zero/bf16", "int4/row/zero"),
    ("int4/group128/zero", "int4/group128/smooth"),
]  # fmt: skip
FP4_PAIRS = [
    ("fp4/group128/m2", "fp8/row"), ("fp4/group32/m1ceil", "fp8/tensor"), ("fp4/group64", "fp8/group64"),
    ("fp4/row", "fp8/row"), ("fp4/group128/bf16", "fp8/row"), ("fp4/group256/m1", "fp8/group128"),
]  # fmt: skip
"""Formats of weights and of x."""


def group_weight(form, act, n, k, seed=1):
    """A weight for the kernel, its quantized tensor, and its dequantized values [N, K] in float64."""
    form, act = Format.parse(form), Format.parse(act)
    q = quantize_tensor(randn(n, k, seed=seed).cpu(), form)
    parts = prepare_group(*(None if t is None else t.to(DEVICE) for t in q.stored_parts), form, act, k)
    return GroupWeight(*parts, group_layout_of(form, act), k), q, q.dequantize(torch.float64).to(DEVICE)


def group_activations(act, m, k, seed=0):
    """Codes [M, K], int8 less their zero points or fp8, scales, and dequantized values in float64."""
    form = Format.parse(act)
    q = quantize_tensor(randn(m, k, seed=seed).cpu(), form)
    codes = q.codes if form.is_float else q.codes.to(torch.int8)
    if q.zero is not None:
        codes = codes - expand_groups(q.zero.to(torch.int8), form, k)
    return codes.to(DEVICE), q.scale.to(DEVICE), q.dequantize(torch.float64).to(DEVICE)
