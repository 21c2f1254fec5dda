"""The operators linear_group and centered: their CPU versions compute what the kernels do."""

from __future__ import annotations

import pytest
import torch
from damaged_arguments import damaged
from group_weights import FP4_PAIRS, PAIRS, group_activations, group_weight
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, random_epilogue
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.triton import triton_group_op as _register
from qcompile.codegen.triton.launch.gemm import Epilogue
from qcompile.codegen.triton.launch.group_gemm import linear_group
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import expand_groups
from qcompile.numerics.rounding import quantize_tensor

op, centered = torch.ops.qcompile_triton.linear_group, torch.ops.qcompile_triton.centered
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the operator runs the kernel there")


@interpreted
@pytest.mark.parametrize("form,act", PAIRS + FP4_PAIRS)
def test_the_cpu_version_is_what_the_kernel_computes(form, act):
    weight, _, values = group_weight(form, act, 40, 272)
    x, x_scale, x_values = group_activations(act, 7, 272)
    e = random_epilogue(("bias", "residual", "low", "up"), 7, 40, 5, torch.float16)
    for epilogue in (Epilogue(), e):
        added = epilogue.bias, epilogue.residual, epilogue.low, epilogue.up
        got = op(x, x_scale, weight.packed, weight.words, *added, form, act, 272, torch.float16)
        want = linear_group(x, x_scale, weight, epilogue, Format.parse(act), torch.float16)
        assert torch.allclose(got, want, rtol=2e-3, atol=1e-3 if epilogue is not e else 2e-2)
        if epilogue is not e:
            assert torch.allclose(got.double(), x_values @ values.t(), rtol=1e-3, atol=1e-3)


@interpreted
@pytest.mark.parametrize("rows", [(2, 3), (5,), (0,)])
@pytest.mark.parametrize(
    "form,act",
    [("int4/group64/zero", "int4/group64"), ("int4/group64/zero", "int8/row"), ("fp4/group64/m2", "fp8/row")],
)
def test_what_a_gpu_runs_is_the_cpu_version(rows, form, act):
    for seed in range(2):
        a = arguments(rows, form, act, seed)
        got, want = _register.linear_group.on_cuda(*a), op(*a)
        assert got.shape == want.shape and torch.allclose(got, want, rtol=2e-3, atol=2e-2)
        a[0] = a[0].transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(_register.linear_group.on_cuda(*a), got)


def arguments(rows, form, act, seed=0):
    weight, _, _ = group_weight(form, act, 24, 64, seed=seed + 1)
    x, x_scale, _ = group_activations(act, max(1, int(torch.Size(rows).numel())), 64)
    count = int(torch.Size(rows).numel())
    x_scale = x_scale[:count].reshape(*rows, x_scale.shape[-1]) if x_scale.ndim else x_scale
    epilogue = torch.randn(24), torch.randn(*rows, 24), torch.randn(*rows, 4), torch.randn(24, 4)
    parts = x_scale.cpu(), weight.packed.cpu(), weight.words.cpu()
    return [x[:count].reshape(*rows, 64).cpu(), *parts, *epilogue, form, act, 64, torch.float16]


@given(
    st.sampled_from([(2, 3), (1,), (0,)]), st.sampled_from([p for p in PAIRS + FP4_PAIRS if "smooth" not in p[1]]),
    st.sampled_from(["none", "size", "rank", "dtype", "None"]), st.integers(0, 7), st.integers(0, 2), st.integers(0, 4),
)  # fmt: skip
def test_real_and_fake_versions_take_and_refuse_the_same(rows, pair, kind, which, at, size):
    a = arguments(rows, *pair)
    a[which] = damaged(a[which], kind, at, size)
    try:
        got, refused = op(*a), ""
    except (ValueError, RuntimeError, NotImplementedError, TypeError) as error:
        refused = str(error)
        assert "qcompile_triton::linear_group: " in refused and "but must be" in refused, refused
    assert kind != "none" or not refused, refused
    with FakeTensorMode() as mode:
        try:
            shaped = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a))
        except (ValueError, RuntimeError, NotImplementedError, TypeError):
            assert refused, "only the fake version refuses"
            return
    assert not refused, f"the fake version takes what the real one refuses: {refused}"
    assert got.shape == shaped.shape and got.dtype == shaped.dtype


@pytest.mark.parametrize("form", ["int4/row/zero", "int4/group32/zero", "int4/group128/zero"])
def test_centered_codes(form):
    form = Format.parse(form)
    q = quantize_tensor(torch.randn(2, 3, 70) + 1, form)
    want = q.codes.int() - expand_groups(q.zero.int(), form, 70)
    got = centered(q.codes, q.zero.float(), str(form))
    assert got.dtype == torch.int8 and torch.equal(got.int(), want) and int(got.abs().max()) > 8


def test_opcheck():
    torch.library.opcheck(op, tuple(arguments((2, 3), "int4/group64/zero", "int4/group64")))
    q = quantize_tensor(torch.randn(3, 64), Format.parse("int4/group32/zero"))
    torch.library.opcheck(centered, (q.codes, q.zero.float(), str(q.format)))
