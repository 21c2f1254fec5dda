"""The operator experts_w: its CPU version computes what the kernel does; real and fake versions agree."""

from __future__ import annotations

import pytest
import torch
from damaged_arguments import damaged
from expert_stacks import FORMS, ends_of, expert_stack
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, randn
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.triton import triton_experts_op as _register
from qcompile.codegen.triton.launch.experts import linear_experts

op = torch.ops.qcompile_triton.experts_w
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the operator runs the kernel there")


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_the_cpu_version_is_what_the_kernel_computes(form):
    weight, _ = expert_stack(form, 3, 40, 200)
    x, ends = randn(9, 200, dtype=torch.float16), ends_of([4, 0, 18])
    rows = torch.arange(24) % 9  # two of them without an expert
    parts = weight.packed, weight.scale, weight.zero
    got = op(x, rows, ends, *parts, form, 200)
    assert torch.allclose(got, linear_experts(x, rows, ends, weight), rtol=2e-3, atol=2e-2)
    assert torch.equal(op(x[rows], None, ends, *parts, form, 200), got) and not got[22:].any()


@interpreted
@pytest.mark.parametrize("count", [7, 0])
@pytest.mark.parametrize("gather", [False, True])
def test_what_a_gpu_runs_is_the_cpu_version(gather, count):
    """Also where the experts' rows change and nothing else does: what was decided holds for any."""
    for seed in range(2):
        a = arguments("int4/group64/zero", count, gather, seed)
        got, want = _register.experts_w.on_cuda(*a), op(*a)
        assert got.shape == want.shape and torch.allclose(got, want, rtol=2e-3, atol=2e-2)
        a[0] = a[0].t().contiguous().t()
        assert torch.equal(_register.experts_w.on_cuda(*a), got)


def arguments(form, count=7, gather=True, seed=0):
    weight, _ = expert_stack(form, 2, 24, 64, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    source = 5 if gather else count
    rows = torch.randint(0, 5, (count,), generator=generator) if gather else None
    split = int(torch.randint(0, count + 1, (), generator=generator))
    parts = (None if part is None else part.cpu() for part in (weight.packed, weight.scale, weight.zero))
    return [randn(source, 64, dtype=torch.float16, seed=seed).cpu(), rows, ends_of([split, count - split]).cpu(),
            *parts, form, 64]  # fmt: skip


@given(
    st.sampled_from(FORMS[:2] + FORMS[3:]), st.booleans(), st.sampled_from(["none", "size", "rank", "dtype", "None"]),
    st.sampled_from([0, 1, 3, 4, 5]), st.integers(0, 2), st.integers(0, 4),
)  # fmt: skip
def test_real_and_fake_versions_take_and_refuse_the_same(form, gather, kind, which, at, size):
    a = arguments(form, gather=gather)
    a[which] = damaged(a[which], kind, at, size)
    try:
        got, refused = op(*a), ""
    except (ValueError, RuntimeError, NotImplementedError, TypeError, IndexError) as error:
        refused = str(error)
    assert kind != "none" or not refused, refused
    with FakeTensorMode() as mode:
        try:
            shaped = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a))
        except (ValueError, RuntimeError, NotImplementedError, TypeError):
            assert refused, "only the fake version refuses"
            return
    by_value = "ends is" in refused or "out of" in refused  # which a fake tensor has not
    assert by_value or not refused, f"the fake version takes what the real one refuses: {refused}"
    assert by_value or (got.shape == shaped.shape and got.dtype == shaped.dtype)


@interpreted
def test_ends_that_fall_are_refused():
    a = arguments("int8/row")
    a[2] = torch.tensor([5, 3])
    with pytest.raises(ValueError, match="rising"):
        op(*a)


def test_opcheck():
    torch.library.opcheck(op, tuple(arguments("int4/group64/zero")))
