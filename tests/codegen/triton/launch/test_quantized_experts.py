"""Experts by rows of codes in the interpreter: the bits of exact integer sums, and float64 for fp8."""

from __future__ import annotations

import pytest
import torch
from expert_stacks import QUANTIZED, ends_of, expert_product, quantized_rows, quantized_stack
from kernel_cases import DEVICE

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.w4a8_layout import byte_layout_of
from qcompile.codegen.triton.launch.experts import ExpertsCall
from qcompile.codegen.triton.launch.quantized_experts import plan_experts_a8, plan_experts_w4a8, prepare_experts_w4a8
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

COUNTS = [[3, 0, 20, 1], [0, 0, 0, 5], [17, 16, 33, 0]]  # rows of each expert: tiles of 16 and more, and none
FORMS = QUANTIZED[:-1]  # the last is int8 for the kernel
IDS = [form for form, _ in FORMS]


def launched(form, x, x_scale, rows, ends, stack, dtype, split_k=1):
    """What the kernel writes, into memory that is not zero."""
    channels = stack[0].shape[1] if len(stack) == 2 else len(stack[0]) // len(ends)
    if len(stack) == 2:
        plan, steps = plan_experts_a8(x, rows, ends, channels, dtype, split_k), None
        packed, scale = stack
    else:
        plan = plan_experts_w4a8(x, rows, ends, channels, byte_layout_of(Format.parse(form)), dtype, split_k)
        packed, steps, scale = stack[:3]
    out = torch.full((len(x if rows is None else rows), channels), 7.0, dtype=dtype, device=DEVICE)
    return plan.run((x, rows, ends, packed, scale, None, x_scale, steps), out, len(out), channels)


def expected(x, x_scale, ends, values, scales):
    """float32: exact sums, times the scale of the row, then that of the channel of the row's expert."""
    sums = expert_product(x, ends, values).float()
    expert = torch.bucketize(torch.arange(len(x), device=x.device), ends.long(), right=True).clamp(max=len(ends) - 1)
    return sums * x_scale * scales[expert]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form,act", FORMS, ids=IDS)
def test_the_bits_of_exact_sums(form, act, dtype):
    for k, counts in zip((208, 256, 64), COUNTS, strict=True):
        stack, values, scales = quantized_stack(form, 4, 40, k)
        x, x_scale = quantized_rows(act, sum(counts), k)
        ends = ends_of(counts)
        got = launched(form, x, x_scale, None, ends, stack, dtype)
        want = expected(x, x_scale, ends, values, scales)
        if act == "int8":
            assert torch.equal(got, want.to(dtype))
        else:  # float32 sums in another order
            size = expected(x.double().abs(), x_scale, ends, values.abs(), scales)
            assert bool(((got.double() - want).abs() <= 2**-8 * want.abs() + 2**-18 * size).all())


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("form,act", [FORMS[0], FORMS[1], FORMS[2]], ids=IDS[:3])
def test_rows_and_their_scales_are_gathered_inside(form, act, integers):
    """The same bits as a copy in the order of the rows; negative ones count from the end, as PyTorch's do."""
    stack, _, _ = quantized_stack(form, 4, 40, 128)
    (x, x_scale), ends = quantized_rows(act, 9, 128), ends_of([7, 0, 10, 1], integers)
    rows = torch.randint(-9, 9, (18,), generator=torch.Generator().manual_seed(0)).to(integers).to(DEVICE)
    got = launched(form, x, x_scale, rows, ends, stack, torch.float16)
    copied = x.view(torch.int8)[rows].view(x.dtype), x_scale[rows].contiguous()
    assert torch.equal(got, launched(form, *copied, None, ends, stack, torch.float16))


@pytest.mark.parametrize("form,act", [FORMS[0], FORMS[1], FORMS[2]], ids=IDS[:3])
def test_rows_behind_the_last_expert_are_zero_whatever_their_scale(form, act):
    stack, values, scales = quantized_stack(form, 3, 24, 64)
    x, x_scale = quantized_rows(act, 40, 64)
    for counts in ([5, 0, 2], [0, 0, 0], [16, 16, 7]):
        x_scale[sum(counts) :] = float("inf")
        got = launched(form, x, x_scale, None, ends_of(counts), stack, torch.bfloat16)
        assert not got[sum(counts) :].any() and bool(got[: sum(counts)].isfinite().all())
        x_scale[sum(counts) :] = 1.0


@pytest.mark.parametrize("form,act", FORMS[:5], ids=IDS[:5])
@pytest.mark.parametrize("split_k", [2, 3, 100])
def test_split_k_changes_no_bit_of_integers(form, act, split_k):
    """Also of gathered rows, of a row whose scale is infinite and has no expert, and of experts without rows."""
    stack, _, _ = quantized_stack(form, 4, 40, 528)
    x, x_scale = quantized_rows(act, 9, 528)
    x_scale[8] = float("inf")
    rows, ends = torch.arange(27, device=DEVICE) % 9 - 9, ends_of([3, 0, 4, 0])
    for gather in (rows, None):
        whole, parts = (launched(form, x, x_scale, gather, ends, stack, torch.float16, split) for split in (1, split_k))
        if act == "int8":
            assert torch.equal(parts, whole)
        assert torch.allclose(parts, whole, rtol=2e-3, atol=2e-2) and not parts[7:].any() and parts[:7].any()


def test_tiles_are_for_the_rows_of_an_expert():
    x, ends = torch.zeros(8, 256, dtype=torch.int8), torch.zeros(8, dtype=torch.int32)
    layout = byte_layout_of(Format.parse("int4/group128/dual"))
    blocks = {}
    for count in (16, 8 * 33, 8 * 1000):
        rows = torch.zeros(count, dtype=torch.int64)
        for plan in (plan_experts_a8(x, rows, ends, 256, torch.float16),
                     plan_experts_w4a8(x, rows, ends, 256, layout, torch.float16)):  # fmt: skip
            call = plan.gemm
            assert isinstance(call, ExpertsCall) and call.spec.gather
            blocks.setdefault(call.spec.template, []).append((call.launch.block_m, call.launch.block_n))
            assert call.grid[1] == -(-256 // call.launch.block_n)
    assert blocks == {"gemm_experts_a8": [(16, 64), (64, 128), (128, 128)],
                      "gemm_experts_w4a8": [(16, 128), (64, 128), (64, 256)]}  # fmt: skip
    assert Gpu().capability == (9, 0)


def test_nothing_to_multiply():
    x, ends = torch.zeros(0, 64, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    assert plan_experts_a8(x, None, ends, 24, torch.float16) is None


def test_other_formats_are_refused():
    q = quantize_tensor(torch.randn(2, 8, 64), Format.parse("int4/group32"))
    with pytest.raises(ValueError, match="int4/group32: no kernel multiplies"):
        prepare_experts_w4a8(*q.stored_parts, q.format, 64)
