"""gemm_group and gemm_fp4_fp8 in the interpreter: sums of groups to the last bit, scales, epilogues and split-K."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from group_weights import FP4_PAIRS, PAIRS, group_activations, group_weight
from kernel_cases import DEVICE, assert_close, epilogue_sum, random_epilogue, random_int8

from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.kernels.group_spec import GemmGroup
from qcompile.codegen.triton.launch.gemm import Epilogue
from qcompile.codegen.triton.launch.group_gemm import linear_group, plan_group, prepare_group
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

SHAPES = [(1, 24, 256), (20, 130, 330), (40, 70, 257), (70, 24, 128), (3, 40, 40)]  # and no multiples of a tile


@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("form,act", PAIRS + FP4_PAIRS)
def test_against_float64(form, act, split_k):
    for m, n, k in SHAPES:
        weight, _, values = group_weight(form, act, n, k)
        x, x_scale, x_values = group_activations(act, m, k)
        want = x_values @ values.t()
        got = linear_group(x, x_scale, weight, Epilogue(), Format.parse(act), torch.float16, split_k)
        assert_close(got, want, x_values.abs() @ values.t().abs(), torch.float16, 2**-20)


@pytest.mark.parametrize("form,act", [p for p in PAIRS if "bf16" not in p[0]])
def test_integer_sums_are_exact(form, act):
    """With scales of one, the whole sum is an integer, which float32 and float16 hold."""
    for m, n, k in SHAPES:
        weight, q, _ = group_weight(form, act, n, k)
        one = dataclasses.replace(q, scale=torch.full_like(q.scale, 2.0**-12))
        words = prepare_group(*(None if t is None else t.to(DEVICE) for t in one.stored_parts), q.format,
                              Format.parse(act), k)[1]  # fmt: skip
        weight = dataclasses.replace(weight, words=words)
        (x,) = random_int8((m, k))
        x_scale = torch.ones_like(group_activations(act, m, k)[1])
        exact = x.double() @ one.dequantize(torch.float64).to(DEVICE).t()
        got = linear_group(x, x_scale, weight, Epilogue(), Format.parse(act), torch.float16)
        assert torch.equal(got, exact.half())


@pytest.mark.parametrize("form,act", FP4_PAIRS)
def test_fp4_weights_are_exact(form, act):
    """With x of small integers and scales of powers of two every sum is a float32, and so is the result."""
    for m, n, k in SHAPES:
        weight, q, _ = group_weight(form, act, n, k)
        one = dataclasses.replace(q, scale=torch.full_like(q.scale, 2.0**-8))
        words = prepare_group(*(None if t is None else t.to(DEVICE) for t in one.stored_parts), q.format,
                              Format.parse(act), k)[1]  # fmt: skip
        weight = dataclasses.replace(weight, words=words)
        x = (random_int8((m, k))[0] // 16).float().to(torch.float8_e4m3fn)
        x_scale = torch.ones_like(group_activations(act, m, k)[1])
        exact = x.double() @ one.dequantize(torch.float64).to(DEVICE).t()
        got = linear_group(x, x_scale, weight, Epilogue(), Format.parse(act), torch.float16)
        assert torch.equal(got, exact.half())


@pytest.mark.parametrize("form,act", [PAIRS[0], PAIRS[2], FP4_PAIRS[0]])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("names", [("bias",), ("residual",), ("low", "up"), ("bias", "residual", "low", "up")])
def test_epilogues(names, split_k, form, act):
    for m, n, k in SHAPES[1:3]:
        weight, _, values = group_weight(form, act, n, k)
        x, x_scale, x_values = group_activations(act, m, k)
        epilogue = random_epilogue(names, m, n, 5, torch.bfloat16)
        want = x_values @ values.t() + epilogue_sum(epilogue)
        got = linear_group(x, x_scale, weight, epilogue, Format.parse(act), torch.bfloat16, split_k)
        assert_close(got, want, want.abs() * 0 + 1, torch.bfloat16, 2**-12)
        assert torch.equal(got, linear_group(x, x_scale, weight, epilogue, Format.parse(act), torch.bfloat16, split_k))


def test_scales_of_one_row_are_its_own():
    """Each row has the bits that it has alone: no other row's scales are read."""
    weight, _, _ = group_weight("int4/group64/zero", "int4/group64", 24, 200)
    x, x_scale, _ = group_activations("int4/group64", 19, 200)
    act = Format.parse("int4/group64")
    whole = linear_group(x, x_scale, weight, Epilogue(), act, torch.float16, 1)
    for row in (0, 7, 18):
        alone = linear_group(x[row : row + 1], x_scale[row : row + 1], weight, Epilogue(), act, torch.float16, 1)
        assert torch.equal(whole[row : row + 1], alone)


def test_tiles_leave_room_for_a_correction():
    rows = [plan_group(Gpu(), GemmGroup(low_rank=rank), 1000, 4096, 4096).gemm.launch.block_m for rank in (64, 65)]
    assert rows == [64, 32]


def test_no_more_ranges_than_blocks():
    assert plan_group(Gpu(), GemmGroup(), 1, 64, 128, split_k=8).split_k == 1


def test_no_rows():
    weight, _, _ = group_weight("int4/group128/zero", "int4/row", 24, 128)
    x, scale = torch.zeros(0, 128, dtype=torch.int8, device=DEVICE), torch.ones(0, 1, device=DEVICE)
    assert linear_group(x, scale, weight, Epilogue(), Format("int4"), torch.float16).shape == (0, 24)


@pytest.mark.parametrize("form,act", [("int4/group128/zero/dual", "int8/row"), ("int8/row", "int4/group64")])
def test_other_formats_are_refused(form, act):
    q = quantize_tensor(torch.randn(8, 128), Format.parse(form))
    with pytest.raises(ValueError, match=f"{form} by {act}: no kernel multiplies"):
        prepare_group(*q.stored_parts, q.format, Format.parse(act), 128)
