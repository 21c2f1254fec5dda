"""Kernels as they are traced: strides and shapes that models really have."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu import traced_kernels as kernels
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

M = [1, 2, 3, 4, 5, 7, 8, 9, 12, 17, 33]  # every block of rows, small M and large M


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_a_lone_row_with_any_stride(stride):
    w, base = torch.randint(-127, 127, (32, 64), dtype=torch.int8), torch.randint(-127, 127, (1, 64), dtype=torch.int8)
    x = torch.empty_strided((1, 64), (stride, 1), dtype=torch.int8).copy_(base)
    want = (base.long() @ w.long().t()).int()
    assert torch.equal(kernels.int8_mm(x, torch.ones(1, 1), w, torch.ones(32, 1), None, torch.float32), want.float())
    got = torch.ops.qcompile.qlinear(
        x, torch.ones(1, 1), None, w, torch.ones(32, 1), None, None, None, "int8/row", "int8/row", 64, torch.float32
    )
    assert torch.equal(got, want.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text",
    ["int4/group128/zero/dual", "int4/group64/zero", "int4/group32", "int4/group96/floatzero", "int4/group64/dual"],
)
@pytest.mark.parametrize("columns", [128, 576])
def test_nibbles_times_floats(text, columns, dtype):
    form = Format.parse(text)
    q = quantize_tensor(torch.randn(64, columns), form)
    a, c = kernels.group_offsets(q.group_scale if form.dual else q.scale, q.zero)
    scale = q.scale.reshape(-1) if form.dual else torch.ones(1)
    nibbles = kernels.prepare_nibbles(q.stored(), form, columns)
    for rows in M:
        x = torch.randn(rows, columns).to(dtype)
        want = x.double() @ q.dequantize().double().t()
        got = kernels.nibble_float(x, nibbles, a, c).double() * scale
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert (got - want).norm() / want.norm() < bound, rows
