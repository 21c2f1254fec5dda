"""The kernels of linear layers against float64 on the same codes, and which kernel runs for which M."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import (
    DEVICE,
    UNIT_ROUNDOFF,
    assert_close,
    epilogue_sum,
    packed_weight,
    randn,
    random_epilogue,
    random_int8,
)

from qcompile.codegen.triton.launch import gemm_plan
from qcompile.codegen.triton.launch.gemm import Epilogue, linear_a8, linear_w
from qcompile.codegen.triton.launch.kernel_call import KernelCall
from qcompile.codegen.triton.launch.tiles import Launch
from qcompile.numerics.format import Format

FORMS = ["int4/group128", "int4/group128/zero", "int4/group64/floatzero", "int4/group32/zero", "int4/row",
         "int8/row", "int8/group64/zero", "int3/group128/zero", "int3/group64", "int2/group64/zero",
         "int2/group32/floatzero", "int4/group256/zero", "int4/group64/zero/dual", "int4/group64/dual",
         "int4/group64/zero/bf16", "int3/group64/bf16"]  # fmt: skip
SHAPES = [(1, 24, 256), (7, 70, 320), (40, 66, 272)]  # no multiples of a tile


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weight_only(form, dtype):
    group = Format.parse(form).group or 1
    for m, n, k in SHAPES:
        k = max(k, group)
        weight, values = packed_weight(form, n, k, dtype)
        x = randn(m, k, dtype=dtype)
        want, size = x.double() @ values.t(), x.double().abs() @ values.abs().t()
        of_groups = dtype == torch.bfloat16 and Format.parse(form).group and "bf16" not in form  # scales are rounded
        rounded = m > 32 or "float" in form or of_groups
        c = UNIT_ROUNDOFF[dtype] if rounded else 2**-14
        assert_close(linear_w(x, weight, Epilogue()), want, size, dtype, c)


@pytest.mark.parametrize(
    "names",
    [n for r in (1, 2) for n in itertools.combinations(("bias", "residual"), r)]
    + [("low", "up"), ("bias", "residual", "low", "up")],
)
@pytest.mark.parametrize("m", [2, 20, 40])
def test_epilogues(names, m, monkeypatch):
    dtype, n, k = torch.float16, 70, 512
    weight, values = packed_weight("int4/group64/zero", n, k)
    x, epilogue = randn(m, k, dtype=dtype), random_epilogue(names, m, n, 5, dtype)
    want, size = x.double() @ values.t() + epilogue_sum(epilogue), x.double().abs() @ values.abs().t()
    for split_k in (1, 3):
        monkeypatch.setattr(gemm_plan, "split_k_of", lambda *_, split_k=split_k: split_k)
        gemm_plan.forget_plans()
        got = linear_w(x, weight, epilogue)
        assert_close(got, want, size, dtype, UNIT_ROUNDOFF[dtype])
        assert torch.equal(got, linear_w(x, weight, epilogue))
    assert_close(linear_w(x, weight, epilogue, variant="dequant"), want, size, dtype, 2 * UNIT_ROUNDOFF[dtype])


@pytest.mark.parametrize("act", ["row", "tensor"])
@pytest.mark.parametrize("m,n,k", [(1, 40, 256), (20, 70, 200), (40, 130, 384)])
@pytest.mark.parametrize("split_k", [1, 2])
def test_int8(act, m, n, k, split_k, monkeypatch):
    monkeypatch.setattr(gemm_plan, "split_k_of", lambda *_: split_k)
    gemm_plan.forget_plans()
    x, w = random_int8((m, k), (n, k))
    exact = x.double() @ w.double().t()
    ones = torch.ones(1, 1, device=DEVICE).expand(m if act == "row" else 1, 1).contiguous()
    got = linear_a8(x, ones, w, torch.full((n, 1), 2.0**-8, device=DEVICE), Epilogue(), torch.float16)
    assert torch.equal(got, (exact * 2.0**-8).half())  # sums below 2^24: exact until the last rounding
    x_scale, scale = randn(m if act == "row" else 1, 1).abs(), randn(n, 1, seed=6).abs() / k
    for names, rank in ((("bias", "residual"), 0), (("low", "up"), 5), (("bias", "residual", "low", "up"), 19)):
        epilogue = random_epilogue(names, m, n, rank, torch.bfloat16)
        want = exact * x_scale.double() * scale.double().t() + epilogue_sum(epilogue)
        got = linear_a8(x, x_scale, w, scale, epilogue, torch.bfloat16)
        assert_close(got, want, want.abs() * 0 + 1, torch.bfloat16, 2**-18)


@pytest.mark.parametrize("split_k", [1, 2])
def test_fp8(split_k, monkeypatch):
    monkeypatch.setattr(gemm_plan, "split_k_of", lambda *_: split_k)
    gemm_plan.forget_plans()
    m, n, k = 20, 70, 256
    x, w = (randn(*s, seed=s[0]).to(torch.float8_e4m3fn) for s in ((m, k), (n, k)))
    x_scale, scale = randn(m, 1).abs(), randn(n, 1, seed=6).abs() / k
    epilogue = random_epilogue(("low", "up"), m, n, 5, torch.bfloat16)
    size = (x.double().abs() @ w.double().abs().t()) * x_scale.double() * scale.double().t()
    want = (x.double() @ w.double().t()) * x_scale.double() * scale.double().t() + epilogue_sum(epilogue)
    got = linear_a8(x, x_scale, w, scale, epilogue, torch.bfloat16)
    assert_close(got, want, size, torch.bfloat16, 2**-12)


def test_no_rows():
    weight, _ = packed_weight("int4/group64", 24, 128)
    assert linear_w(randn(0, 128, dtype=torch.float16), weight, Epilogue()).shape == (0, 24)


@pytest.fixture
def launched(monkeypatch):
    """Template, tile and grid of every launch of a plan."""
    found, real = [], KernelCall.__call__

    def call(self, tensors):
        found.append((self.spec.template, self.launch.block_m, self.grid))
        real(self, tensors)

    monkeypatch.setattr(KernelCall, "__call__", call)
    return found


def test_launch_sizes_reach_the_kernel(launched):
    weight, values = packed_weight("int4/group64", 24, 128)
    x = randn(17, 128, dtype=torch.float16)
    got = linear_w(x, weight, Epilogue(), Launch(16, 16, 4, 2))
    assert launched == [("gemm_w", 16, (2 * 2, 1, 1))]
    size = x.double().abs() @ values.abs().t()
    assert_close(got, x.double() @ values.t(), size, torch.float16, UNIT_ROUNDOFF[torch.float16])


def test_m_chooses_the_kernel_when_it_runs(own_cache, launched):
    """One packed weight, any M: nothing about it is fixed when a graph is lowered."""
    weight, values = packed_weight("int4/group64", 24, 128)
    for m, want in ((1, [16]), (5, [16]), (33, [64]), (65, [128]), (1024, [128]), (1025, [])):
        x = randn(m, 128, dtype=torch.float16)
        launched.clear()
        got = linear_w(x, weight, Epilogue())
        assert [block_m for _, block_m, _ in launched] == want  # beyond, dequantized once and multiplied by cuBLAS
        size = x.double().abs() @ values.abs().t()
        assert_close(got, x.double() @ values.t(), size, torch.float16, UNIT_ROUNDOFF[torch.float16])


def test_dequantized_words_are_multiplied_by_cublas():
    """Scales and zero points of a bfloat16 model are words there too; a strided zero point is made dense."""
    weight, values = packed_weight("int4/group64/zero/bf16", 70, 256, torch.bfloat16)
    x = randn(5, 256, dtype=torch.bfloat16)
    size = x.double().abs() @ values.abs().t()
    got = linear_w(x, weight, Epilogue(), variant="dequant")
    assert_close(got, x.double() @ values.t(), size, torch.bfloat16, UNIT_ROUNDOFF[torch.bfloat16])
