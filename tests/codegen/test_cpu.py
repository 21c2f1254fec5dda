"""CPU kernels against the dialect's references; the strides and sizes that models really have."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.cpu import kernels
from qcompile.codegen.cpu.choose import candidates, choose
from qcompile.formats import Format, load_codes, quantize_tensor

DUAL = Format.parse("int4/group128/zero/dual")


@pytest.mark.parametrize("stride", [1, 7, 64])
def test_a_lone_row_with_any_stride(stride):
    w, base = torch.randint(-127, 127, (32, 64), dtype=torch.int8), torch.randint(-127, 127, (1, 64), dtype=torch.int8)
    x = torch.empty_strided((1, 64), (stride, 1), dtype=torch.int8).copy_(base)
    want = (base.long() @ w.long().t()).int()
    assert torch.equal(kernels.int8_mm(x, w), want)
    q = quantize_tensor(w.float(), Format("int8"))
    got = torch.ops.qcompile.qlinear(
        x, torch.ones(1, 1), None, w, torch.ones(32, 1), None, None, None, "int8/row", "int8/row", 64, torch.float32
    )
    assert torch.equal(got, want.float()) and q.columns == 64


@pytest.mark.parametrize("columns", [128, 576, 96])
@pytest.mark.parametrize("rows", [2, 5])
def test_dual_sums_are_exact(columns, rows):
    q = quantize_tensor(torch.randn(64, columns), DUAL)
    x = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    inner = (q.dequantize().double() / q.scale.double()).round()
    nibbles = kernels.prepare_nibbles(q.stored(), DUAL, columns)
    assert torch.equal(kernels.nibble_mm(x, nibbles, q.group_scale, q.zero).double(), x.double() @ inner.t())


@pytest.mark.parametrize(
    "text", ["int4/group128/zero/dual", "int4/group64/zero", "int4/group32", "int4/group64/floatzero"]
)
@pytest.mark.parametrize("columns", [128, 576])
def test_nibbles_and_packs(text, columns):
    form = Format.parse(text)
    q = quantize_tensor(torch.randn(64, columns), form)
    x = torch.randn(1, columns)
    a, c = kernels.group_offsets(q.group_scale if form.dual else q.scale, q.zero, form)
    scale = q.scale.reshape(-1) if form.dual else torch.ones(1)
    want = x @ q.dequantize().t()
    nibbles = kernels.prepare_nibbles(q.stored(), form, columns)
    assert torch.allclose(kernels.nibble_gemv(x, nibbles, a, c) * scale, want, rtol=1e-4, atol=1e-3)
    assert torch.allclose(kernels.nibble_dequant_mm(x, nibbles, a, c) * scale, want, rtol=1e-4, atol=1e-3)
    if kernels.int4pack_block():
        packed, both = kernels.prepare_int4pack(q.stored(), a, q.zero, form, columns)
        got = kernels.int4pack(x.bfloat16(), packed, both).float() * scale
        assert (got - want).norm() / want.norm() < 1e-2


def test_float_codes_round_trip_through_blocks():
    if not kernels.int4pack_block():
        return
    codes = torch.randint(0, 16, (128, 64), dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(kernels.pack_int4_blocks(codes, kernels.int4pack_block()).view(packed.shape), packed)


def test_activation_codes_are_the_reference():
    x = torch.randn(7, 33)
    codes, scale = kernels.quantize_rows(x)
    want = torch.ops.qcompile.quantize(x, "int8/row")
    assert torch.equal(codes, want[0]) and torch.equal(scale, want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices(dtype):
    eight = choose(Format("int8"), "int8/row", dtype, 512, 2048, 2048)
    assert eight.kernel == "int8_mm" and eight.ratio > 1
    assert choose(Format("fp8"), "fp8/row", torch.bfloat16, 8, 2048, 2048).slower
    assert "nibble_mm" not in candidates(DUAL, "int8/row", dtype, 1, 576, 576)
    stored = quantize_tensor(torch.randn(2, 32), Format.parse("int3/group32/zero"))
    assert load_codes(stored.stored(), stored.format, 32).shape == (2, 32)
