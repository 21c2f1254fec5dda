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


@pytest.mark.parametrize("text", ["int4/group{}/zero", "int4/group{}", "int4/group{}/zero/dual", "int4/group{}/dual"])
def test_a_group_beyond_the_row_takes_no_more_than_the_row(text):
    """Bytes of the row's columns, and the very values of a group that is just as wide."""
    w, x = torch.randn(5, 40), torch.randn(3, 40)
    found = []
    for group in (128, 2**40):
        form = Format.parse(text.format(group))
        q = quantize_tensor(w, form)
        nibbles = kernels.prepare_nibbles(q.stored(), form, 40)
        assert nibbles.shape == (5, 1, 48)
        found.append(
            kernels.nibble_float(x, nibbles, *kernels.group_offsets(q.group_scale if form.dual else q.scale, q.zero))
        )
        want = x @ (q.dequantize() / q.scale if form.dual else q.dequantize()).t()
        assert torch.allclose(found[-1], want, rtol=1e-4, atol=1e-3)
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 1, 64), (2, 3, 64), (20, 0)])
def test_rows_of_any_leading_shape(shape):
    k = shape[-1]
    w, x = torch.randint(-127, 127, (5, k), dtype=torch.int8), torch.randn(shape)
    assert torch.allclose(kernels.int8_float(x, w), x @ w.float().t(), rtol=1e-4, atol=1e-3)
    codes, scale = torch.randint(-127, 127, shape, dtype=torch.int8), torch.ones(5, 1)
    got = kernels.int8_mm(codes, torch.ones(*shape[:-1], 1), w, scale, None, torch.float32)
    assert torch.equal(got, codes.float() @ w.float().t())
