"""gemm_experts in the interpreter: each row by its expert's weight, gathered or not; zeros for rows that have none."""

from __future__ import annotations

import pytest
import torch
from expert_stacks import FORMS, ends_of, expert_product, expert_stack
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_close, randn

from qcompile.codegen.triton.kernels.experts_spec import GemmExperts
from qcompile.codegen.triton.kernels.gpu import Gpu
from qcompile.codegen.triton.launch.experts import ExpertSizes, linear_experts, plan_experts, prepare_experts
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

COUNTS = [[3, 0, 20, 1], [0, 0, 0, 5], [17, 16, 33, 0]]  # rows of each expert: tiles of 16 and more, and none


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_against_float64(form, dtype):
    weight, values = expert_stack(form, 4, 40, 200, dtype)
    paired = dtype == torch.bfloat16 and not weight.scale.is_floating_point()
    for counts in COUNTS:
        x = randn(sum(counts), 200, dtype=dtype)
        ends = ends_of(counts)
        want = expert_product(x, ends, values)
        size = expert_product(x.abs(), ends, values.abs())
        assert_close(linear_experts(x, None, ends, weight), want, size, dtype, 2**-8 if paired or dtype != torch.float16
                     else 2**-10)  # fmt: skip


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_rows_are_gathered_inside(integers):
    """The same bits as a copy in the order of the rows; negative ones count from the end, as PyTorch's do."""
    weight, _ = expert_stack("int4/group128/zero", 4, 40, 200)
    x, ends = randn(9, 200, dtype=torch.float16), ends_of([7, 0, 10, 1], integers)
    rows = torch.randint(-9, 9, (18,), generator=torch.Generator().manual_seed(0)).to(integers).to(DEVICE)
    got = linear_experts(x, rows, ends, weight)
    assert torch.equal(got, linear_experts(x[rows].contiguous(), None, ends, weight)) and got.shape == (18, 40)


def test_rows_behind_the_last_expert_are_zero():
    weight, values = expert_stack("int8/row", 3, 24, 64)
    x = randn(40, 64, dtype=torch.float16)
    for counts in ([5, 0, 2], [0, 0, 0], [16, 16, 7], [1, 0, 39]):
        got = linear_experts(x, None, ends_of(counts), weight)
        want = expert_product(x, ends_of(counts), values)
        assert torch.allclose(got.double(), want, rtol=2e-3, atol=2e-2) and not got[sum(counts) :].any()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 20))
def test_every_row_is_multiplied_once_by_its_own_expert(counts, behind):
    """Experts are told apart by their weights: expert e has e + 1 everywhere."""
    experts, k = len(counts), 32
    form = Format.parse("int8/row")
    stack = (torch.arange(1.0, experts + 1)[:, None, None]).expand(experts, 2, k).contiguous()
    q = quantize_tensor(stack, form)
    weight, _ = expert_stack("int8/row", experts, 2, k)
    parts = prepare_experts(*(None if t is None else t.to(DEVICE) for t in q.stored_parts), form, k, torch.float16)
    weight = type(weight)(*parts, weight.layout, k)
    total = sum(counts) + behind
    x = torch.zeros(total, k, dtype=torch.float16, device=DEVICE)
    if total:
        x[:, 0] = 1.0
    want = torch.cat([torch.full((c,), e + 1.0) for e, c in enumerate(counts)] + [torch.zeros(behind)])
    got = linear_experts(x, None, ends_of(counts), weight)
    assert torch.allclose(got.cpu().float(), want[:, None].expand(total, 2), rtol=1e-3)


def test_a_grid_holds_every_tile():
    """However rows are spread over the experts, and whatever is behind the last one."""
    for rows, experts in ((1, 8), (2, 8), (16, 1), (100, 4), (4096, 8), (40, 128)):
        call = plan_experts(Gpu(), GemmExperts(), ExpertSizes(rows, rows, experts, 256, 512)).gemm
        block = call.launch.block_m
        for counts in ([rows], [0] * (experts - 1) + [rows], [rows // experts] * experts, [1] * min(rows, experts)):
            parts = [*counts, rows - sum(counts)]
            assert sum(-(-count // block) for count in parts) <= call.grid[0]
    assert call.grid[1] == 2


def test_tiles_are_for_the_rows_of_an_expert():
    sizes = [(16, 8), (8 * 33, 8), (8 * 1000, 8)]
    launches = [plan_experts(Gpu(), GemmExperts(), ExpertSizes(s, s, e, 256, 512)).gemm.launch for s, e in sizes]
    assert [launch.block_m for launch in launches] == [16, 64, 128]


def test_a_decoded_token_gives_work_to_the_whole_gpu():
    """Two rows of two experts: 64 tiles of 4096 channels for 132 multiprocessors. A prompt needs no parts."""
    token = plan_experts(Gpu(), GemmExperts(), ExpertSizes(2, 1, 8, 4096, 14336))
    assert token.split_k > 1 and token.gemm.grid == (2, 32, token.split_k) and token.gemm.spec.parts
    assert token.sum_k is not None and token.sum_dtype == torch.float32 and token.sum_k.grid == (2, 4, 1)
    prompt = plan_experts(Gpu(), GemmExperts(), ExpertSizes(4096, 2048, 8, 4096, 14336))
    assert prompt.split_k == 1 and prompt.sum_k is None and not prompt.gemm.spec.parts


@pytest.mark.parametrize("form", ["int4/group64", "int8/row", "int4/row/zero", "int3/group64/zero"])
@pytest.mark.parametrize("split_k", [2, 3, 100])
def test_split_k(form, split_k):
    weight, values = expert_stack(form, 4, 40, 520)
    x = randn(9, 520, dtype=torch.float16)
    rows, ends = torch.arange(30, device=DEVICE) % 9, ends_of([3, 0, 20, 1])  # six rows without an expert
    want, size = (expert_product(a[rows], ends, b) for a, b in ((x, values), (x.abs(), values.abs())))
    got = linear_experts(x, rows, ends, weight, split_k)
    assert_close(got, want, size, torch.float16, 2**-10)
    assert not got[24:].any() and torch.equal(got, linear_experts(x, rows, ends, weight, split_k))


def test_nothing_to_multiply():
    weight, _ = expert_stack("int8/row", 2, 24, 64)
    assert linear_experts(torch.zeros(0, 64).half(), None, ends_of([0, 0]), weight).shape == (0, 24)


def test_other_formats_are_refused():
    q = quantize_tensor(torch.randn(2, 8, 64), Format.parse("fp4/group32"))
    with pytest.raises(ValueError, match="fp4/group32: no kernel reads"):
        prepare_experts(*q.stored_parts, q.format, 64, torch.float16)
