"""Operators of the CPU target against exact integer sums and the dialect's references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.codegen.cpu import native_kernels as native
from qcompile.codegen.cpu import traced_kernels as kernels
from qcompile.numerics import int8_matmul
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor, dequantize_to_int8
from qcompile.numerics.rounding import quantize_tensor

ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 17, 33]  # every block of rows, both sides of SMALL_M_INT8 and SMALL_M_FLOAT


def kernel_sums(x, w):
    """Integer sums, exact in float64 as long as the scales are one."""
    return kernels.int8_mm(x, torch.ones(len(x), 1), w, torch.ones(len(w), 1), None, torch.float32)


def dual_sums(x, nibbles, scale, zero):
    ones = torch.ones(len(nibbles), 1)
    return kernels.dual_mm(x, torch.ones(len(x), 1), nibbles, scale, zero, ones, None, torch.float32)


@pytest.mark.parametrize("columns", [64, 100, 576])
@pytest.mark.parametrize("rows", ROWS)
def test_int8_sums_are_exact(rows, columns):
    x, w = (torch.randint(-128, 128, (n, columns), dtype=torch.int8) for n in (rows, 41))
    assert torch.equal(kernel_sums(x, w).long(), x.long() @ w.long().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
def test_scales_and_bias_after_the_sums(monkeypatch, rows, bias, dtype):
    """The operator is the dialect's reference, by chunks of channels too."""
    x, x_scale, _ = torch.ops.qcompile.quantize(torch.randn(rows, 64), "int8/row")
    shift = torch.randn(600) if bias else None
    for text in ("int8", "int4/group32/zero/dual"):
        q = quantize_tensor(torch.randn(600, 64), Format.parse(text))
        want = torch.ops.qcompile.qlinear(
            x, x_scale, None, q.stored(), q.scale, q.zero, q.group_scale, shift, str(q.format), "int8/row", 64, dtype
        )
        for limit in (native._SUMS_BYTES, 1):
            monkeypatch.setattr(native, "_SUMS_BYTES", limit)
            if text == "int8":
                got = kernels.int8_mm(x, x_scale, q.codes, q.scale, shift, dtype)
            else:
                nibbles = kernels.prepare_nibbles(q.stored(), q.format, 64)
                got = kernels.dual_mm(x, x_scale, nibbles, q.group_scale, q.zero, q.scale, shift, dtype)
            assert got.dtype == dtype
            assert torch.allclose(got.float(), want.float(), rtol={torch.float32: 1e-5}.get(dtype, 1e-2), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ROWS), st.integers(1, 300), st.sampled_from([32, 64, 128, 192]), st.integers(0, 2**30))
def test_dual_sums_are_exact(rows, columns, group, seed):
    generator = torch.Generator().manual_seed(seed)
    form = Format("int4", "group", group, "int", dual=True)
    q = quantize_tensor(torch.randn(37, columns, generator=generator), form)
    # Every code, zero and scale that the format allows, not only those that a bell curve brings.
    zero = torch.randint(0, 16, q.zero.shape, generator=generator).to(torch.uint8)
    scale = torch.randint(1, 17, q.group_scale.shape, generator=generator).to(torch.int8)
    codes = torch.randint(0, 16, q.codes.shape, generator=generator)
    z, s = (t.long().repeat_interleave(group, 1)[:, :columns] for t in (zero, scale))
    codes = torch.minimum(torch.maximum(codes, z - 127 // s), z + 127 // s).clamp(0, 15)
    stored = QTensor(codes.to(torch.uint8), q.scale, zero, scale, form).stored()
    x = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    nibbles = kernels.prepare_nibbles(stored, form, columns)
    assert torch.equal(dual_sums(x, nibbles, scale, zero).long(), x.long() @ ((codes - z) * s).t())
    # Without zero points group scales have either sign.
    form, levels = Format("int4", "group", group, dual=True), codes.clamp(0, 15) - 8
    signs = torch.where(torch.rand(scale.shape, generator=generator) < 0.5, -1, 1).to(torch.int8)
    signed = signs * scale.clamp(max=15)
    stored = QTensor(levels.to(torch.int8), q.scale, None, signed, form).stored()
    weight = dequantize_to_int8(levels, None, signed, form).long()
    got = dual_sums(x, *kernels.prepare_symmetric(stored, signed, form, columns))
    assert torch.equal(got.long(), x.long() @ weight.t())


@pytest.mark.parametrize("rows", ROWS)
def test_int8_times_floats(rows):
    w, x = torch.randint(-127, 128, (33, 100), dtype=torch.int8), torch.randn(rows, 100)
    want = x.double() @ w.double().t()
    assert (kernels.int8_float(x, w) - want).norm() / want.norm() < 1e-5


def test_large_weights_go_by_chunks(monkeypatch):
    w, x = torch.randint(-127, 128, (300, 100), dtype=torch.int8), torch.randn(9, 100)
    q = quantize_tensor(torch.randn(300, 100), Format.parse("int4/group32/zero"))
    nibbles, (a, c) = kernels.prepare_nibbles(q.stored(), q.format, 100), kernels.group_offsets(q.scale, q.zero)
    whole, of_nibbles = kernels.int8_float(x, w), kernels.nibble_float(x, nibbles, a, c)
    monkeypatch.setattr(native, "_CHUNK_BYTES", 64 * 100 * 4)
    assert torch.allclose(kernels.int8_float(x, w), whole, rtol=1e-5, atol=1e-3)
    assert torch.allclose(kernels.nibble_float(x, nibbles, a, c), of_nibbles, rtol=1e-5, atol=1e-3)


def test_bfloat16_is_rounded_to_nearest_even():
    form = Format.parse("int4/group32/zero")
    q = quantize_tensor(torch.randn(8, 96), form)
    nibbles = kernels.prepare_nibbles(q.stored(), form, 96)
    a, c = kernels.group_offsets(q.scale, q.zero)
    exact = native.unpack_nibble(nibbles, a, c, 96, torch.float32).clone()
    assert torch.allclose(exact, q.dequantize(), rtol=1e-5, atol=1e-6)
    assert torch.equal(native.unpack_nibble(nibbles, a, c, 96, torch.bfloat16), exact.bfloat16())


def test_operators_are_well_behaved():
    ops = torch.ops.qcompile_cpu
    q = quantize_tensor(torch.randn(16, 64), Format.parse("int4/group32/zero/dual"))
    nibbles = kernels.prepare_nibbles(q.stored(), q.format, 64)
    a, c = kernels.group_offsets(q.group_scale, q.zero)
    for rows in (2, 20):
        codes, x = torch.randint(-127, 128, (rows, 64), dtype=torch.int8), torch.randn(rows, 64)
        scale = torch.rand(rows, 1)
        for op, args in (
            (ops.int8_mm.default, (codes, scale, codes, scale, None, torch.bfloat16)),
            (ops.dual_mm.default, (codes, scale, nibbles, q.group_scale, q.zero, q.scale, None, torch.float32)),
            (ops.int8_float.default, (x, codes)),
            (ops.nibble_float.default, (x, nibbles, a, c)),
        ):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_a_lone_column():
    w, x = torch.randint(-127, 127, (32, 1), dtype=torch.int8), torch.randint(-127, 127, (20, 1), dtype=torch.int8)
    want = (x.long() @ w.long().t()).float()
    assert torch.equal(kernel_sums(x, w), want)
    one = torch.ones(20, 1), None, w, torch.ones(32, 1), None, None, None, "int8/row", "int8/row", 1, torch.float32
    assert torch.equal(torch.ops.qcompile.qlinear(x, *one), want)


@pytest.mark.parametrize("columns", [1, 96, 1024, 1025, 3000])
@pytest.mark.parametrize("fast", [False, True])
def test_sums_are_exact_on_every_processor(monkeypatch, columns, fast):
    """The largest integers, with and without 8-bit dot products: float32 sums stay below 2^24."""
    monkeypatch.setattr(int8_matmul, "has_fast_int8_matmul", lambda: fast)
    monkeypatch.setattr(native, "has_fast_int8_matmul", lambda: fast)
    x = torch.tensor([-128, -128, -127, 127], dtype=torch.int8)[torch.randint(4, (20, columns))]
    w = torch.tensor([-128, -128, 127, -127], dtype=torch.int8)[torch.randint(4, (33, columns))]
    x[0], w[0] = -128, -128  # the largest sum of all
    x[1], w[1] = 127, 127  # and an odd one, which float32 has not beyond 2^24
    x[1, 0] = 127 if columns % 2 else 126
    want = (x.double() @ w.double().t()).int()
    assert torch.equal(int8_matmul.int8_matmul(x, w), want)
    found = torch.ops.qcompile_cpu.int8_mm(x, torch.ones(20, 1), w, torch.ones(33, 1), None, torch.float32)
    assert torch.equal(found, want.float())


def product_operands(rows):
    q = quantize_tensor(torch.randn(40, 64), Format.parse("int4/group32/zero/dual"))
    nibbles, (a, c) = kernels.prepare_nibbles(q.stored(), q.format, 64), kernels.group_offsets(q.group_scale, q.zero)
    codes, w = (torch.randint(-127, 128, (n, 64), dtype=torch.int8) for n in (rows, 40))
    x, x_scale, bias = torch.randn(rows, 64), torch.rand(rows, 1), torch.randn(40)
    ops = torch.ops.qcompile_cpu
    return [
        (ops.int8_mm, (codes, x_scale, w, q.scale, bias, torch.float32)),
        (ops.dual_mm, (codes, x_scale, nibbles, q.group_scale, q.zero, q.scale, bias, torch.float32)),
        (ops.int8_float, (x, w)),
        (ops.nibble_float, (x, nibbles, a, c)),
    ]


@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_torch_does_not_matter(rows, default):
    """Buffers are written as float32 by native_kernels.cpp, whatever `torch.empty` would make."""
    for op, args in product_operands(rows):
        want = op(*args)
        torch.set_default_dtype(default)
        try:
            got = op(*args)
        finally:
            torch.set_default_dtype(torch.float32)
        assert got.dtype == torch.float32 and torch.equal(got, want)


def test_buffers_made_in_inference_mode_serve_outside(monkeypatch):
    for op, args in product_operands(20):
        want = op(*args)
        monkeypatch.setattr(native, "_scratch", native._Scratch())
        with torch.inference_mode():
            assert torch.equal(op(*args), want)
        assert torch.equal(op(*args), want)


@pytest.mark.parametrize("rows", [2, 20])
def test_rows_that_require_gradients_are_multiplied(rows):
    for op, (x, *rest) in product_operands(rows)[2:]:
        assert torch.equal(op(x.requires_grad_(), *rest).detach(), op(x.detach(), *rest))


@pytest.mark.parametrize("rows", [2, 20])
def test_float64_is_computed_in_float64(rows):
    (int8_mm, (*scaled, _)), (dual_mm, (*dual, _)), (int8_float, (x, w)), _ = product_operands(rows)
    codes, x_scale, w8, scale, bias = (t.double() for t in scaled)
    want = codes @ w8.t() * x_scale * scale.t() + bias
    assert torch.allclose(int8_mm(*scaled, torch.float64), want, rtol=1e-14, atol=1e-12)
    single = dual_mm(*dual, torch.float32).double()
    assert torch.allclose(dual_mm(*dual, torch.float64), single, rtol=1e-5, atol=1e-4)
    assert torch.allclose(int8_float(x.double(), w), x.double() @ w.double().t(), rtol=1e-14, atol=1e-12)


def test_not_a_number_stays_one_in_bfloat16():
    codes = torch.ones(1, 64, dtype=torch.int8)
    payload = torch.tensor([[0x7FFFFFFF]], dtype=torch.int32).view(torch.float32)
    for bad in (payload, -payload, torch.full((1, 1), torch.nan)):
        out = torch.ops.qcompile_cpu.int8_mm(codes, bad, codes, torch.ones(1, 1), None, torch.bfloat16)
        assert bool(out.isnan().all())
