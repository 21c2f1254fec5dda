"""experts_a8 and experts_w4a8: their CPU versions are what the kernels compute; real and fake versions agree."""

from __future__ import annotations

import pytest
import torch
from damaged_arguments import damaged
from expert_stacks import QUANTIZED, ends_of, quantized_rows, quantized_stack
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.triton import triton_quantized_experts_op as _register

ops = torch.ops.qcompile_triton
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="the operators run the kernels there")
OPERATORS = {2: (ops.experts_a8, _register.experts_a8), 5: (ops.experts_w4a8, _register.experts_w4a8)}


def arguments(form, act, count=7, gather=True, seed=0):
    """Of the operator for a format, which is the first result."""
    k = 96 if "24" in form else 128
    stack, _, _ = quantized_stack(form, 2, 24, k, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    x, x_scale = quantized_rows(act, 5 if gather else count, k, seed)
    rows = torch.randint(0, 5, (count,), generator=generator) if gather else None
    split = int(torch.randint(0, max(count, 1), (), generator=generator))
    tensors = [x, x_scale, rows, ends_of([split, max(count - split - 1, 0)])]
    return OPERATORS[len(stack)], [
        *(t.cpu() if isinstance(t, torch.Tensor) else t for t in (*tensors, *stack)), torch.float16
    ]  # fmt: skip


@interpreted
@pytest.mark.parametrize("count", [7, 0])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("form,act", QUANTIZED)
def test_what_a_gpu_runs_is_the_cpu_version(form, act, gather, count):
    """The same bits where sums are integers, also where only the rows of the experts change."""
    for seed in range(2):
        (op, both), a = arguments(form, act, count, gather, seed)
        got, want = both.on_cuda(*a), op(*a)
        assert got.shape == want.shape == (count, 24) and got.dtype == torch.float16
        assert torch.equal(got, want) if act == "int8" else torch.allclose(got, want, rtol=2e-3, atol=2e-2)
        assert not count or not got[-1].any(), "the last row has no expert"


@given(
    st.sampled_from([QUANTIZED[0], QUANTIZED[2], QUANTIZED[4], QUANTIZED[7]]), st.booleans(),
    st.sampled_from(["none", "size", "rank", "dtype", "None"]), st.integers(0, 6), st.integers(0, 2), st.integers(0, 4),
)  # fmt: skip
def test_real_and_fake_versions_take_and_refuse_the_same(pair, gather, kind, which, at, size):
    (op, _), a = arguments(*pair, gather=gather)
    if isinstance(a[which], torch.Tensor):
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


@pytest.mark.parametrize("form,act", [QUANTIZED[0], QUANTIZED[2]])
def test_opcheck(form, act):
    (op, _), a = arguments(form, act)
    torch.library.opcheck(op, tuple(a))
