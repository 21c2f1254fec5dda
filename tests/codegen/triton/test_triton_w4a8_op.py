"""The operator linear_w4a8: its CPU version computes what the kernel does; wrong arguments are named."""

from __future__ import annotations

import pytest
import torch
from damaged_arguments import damaged
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, randn, random_epilogue, random_int8
from torch._subclasses.fake_tensor import FakeTensorMode
from w4a8_weights import FORMS, byte_weight

from qcompile.codegen.triton import triton_w4a8_op as _register  # noqa: F401
from qcompile.codegen.triton.launch.gemm import Epilogue
from qcompile.codegen.triton.launch.w4a8 import linear_w4a8

op = torch.ops.qcompile_triton.linear_w4a8
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the operator runs the kernel there")


@interpreted
@pytest.mark.parametrize("form", FORMS)
def test_the_cpu_version_is_what_the_kernel_computes(form):
    weight, _ = byte_weight(form, 40, 272)
    (x,), x_scale = random_int8((7, 272)), randn(7, 1).abs() / 99
    bare = op(x, x_scale, weight.packed, weight.steps, weight.scale, *[None] * 4, form, 272, torch.float16)
    assert torch.equal(bare, linear_w4a8(x, x_scale, weight, Epilogue(), torch.float16))
    e = random_epilogue(("bias", "residual", "low", "up"), 7, 40, 5, torch.float16)
    epilogue = (e.bias, e.residual, e.low, e.up)
    got = op(x, x_scale, weight.packed, weight.steps, weight.scale, *epilogue, form, 272, torch.float16)
    assert torch.allclose(got, linear_w4a8(x, x_scale, weight, e, torch.float16), rtol=2e-3, atol=2e-2)


@interpreted
@pytest.mark.parametrize("rows", [(2, 3), (5,), (0,)])
def test_what_a_gpu_runs_is_the_cpu_version(rows):
    """In the interpreter: what is decided for a call, and the next one of its kind with other values."""
    for seed in range(2):
        a = arguments(rows, "int4/group64/zero/dual", seed)
        got, want = _register.linear_w4a8.on_cuda(*a), op(*a)
        assert got.shape == want.shape and torch.allclose(got, want, rtol=2e-3, atol=2e-2)
        a[0] = a[0].transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(_register.linear_w4a8.on_cuda(*a), got)


def arguments(rows, form, seed=0):
    weight, _ = byte_weight(form, 24, 64, seed=seed + 1)
    (x,) = random_int8((*rows, 64))
    epilogue = torch.randn(24), torch.randn(*rows, 24), torch.randn(*rows, 4), torch.randn(24, 4)
    parts = (part.cpu() for part in (weight.packed, weight.steps, weight.scale))
    return [x.cpu(), torch.rand(*rows, 1), *parts, *epilogue, form, 64, torch.float16]


@given(
    st.sampled_from([(2, 3), (1,), (0,), ()]), st.sampled_from(FORMS),
    st.sampled_from(["none", "size", "rank", "dtype", "None"]), st.integers(0, 8), st.integers(0, 2), st.integers(0, 4),
)  # fmt: skip
def test_real_and_fake_versions_take_and_refuse_the_same(rows, form, kind, which, at, size):
    a = arguments(rows, form)
    a[which] = damaged(a[which], kind, at, size)
    try:
        got, refused = op(*a), ""
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        refused = str(error)
        assert "qcompile_triton::linear_w4a8: " in refused and "but must be" in refused, refused
    assert kind != "none" or not refused, refused
    with FakeTensorMode() as mode:
        try:
            shaped = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a))
        except (ValueError, RuntimeError, NotImplementedError, TypeError):
            assert refused, "only the fake version refuses"
            return
    assert not refused, f"the fake version takes what the real one refuses: {refused}"
    assert got.shape == shaped.shape and got.dtype == shaped.dtype


def test_other_formats_and_no_columns_are_refused():
    a = arguments((2,), "int4/row/zero")
    for at, value, says in ((-3, "int4/group64/zero", "format is 'int4/group64/zero'"), (-2, 63, "`columns` = 63")):
        wrong = list(a)
        wrong[at] = value
        with pytest.raises(ValueError, match=says):
            op(*wrong)


def test_opcheck():
    torch.library.opcheck(op, tuple(arguments((2, 3), "int4/group64/zero/dual")))
