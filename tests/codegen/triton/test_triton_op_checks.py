"""Whatever the arguments, an operator of the GPU target has a right value or refuses; real and fake versions agree."""

from __future__ import annotations

import pytest
import torch
from damaged_arguments import damaged
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.triton import triton_op_checks
from qcompile.codegen.triton import triton_ops as _register  # noqa: F401
from qcompile.codegen.triton.kernels.spec import RowQuant
from qcompile.codegen.triton.launch.pack_weights import prepare
from qcompile.codegen.triton.launch.row_quant import transform_matrices
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

ops = torch.ops.qcompile_triton
REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError)
SPEC = "row_quant/fp16/first=layer/residual/value/smooth/hadamard=64"


def arguments(op, rows, text):
    epilogue = torch.randn(24), torch.randn(*rows, 24), torch.randn(*rows, 4), torch.randn(24, 4)
    if op == "linear_w":
        form = Format.parse(text)
        packed, scale, zero = prepare(*quantize_tensor(torch.randn(24, 64), form).stored_parts, form, 64, torch.float16)
        return [torch.randn(*rows, 64), packed, scale, zero, *epilogue, text, 64]
    if op == "linear_a8":
        x, w = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((*rows, 64), (24, 64)))
        return [x, torch.rand(*rows, 1), w, torch.rand(24, 1), *epilogue, torch.float16]
    x, ones = torch.randn(*rows, 64).half(), torch.ones(64)
    sides = transform_matrices(RowQuant(hadamard=64), x.device)
    return [x, x, None, ones, ones, ones, ones, *sides, 1e-5, SPEC]


@given(
    st.sampled_from(["linear_w", "linear_a8", "row_quant"]), st.sampled_from([(2, 3), (1,), (0,), ()]),
    st.sampled_from(["int4/group32/zero", "int8", "int3/group64", "int4/group128/floatzero", "int2/group32"]),
    st.sampled_from(["none", "size", "rank", "dtype", "None"]), st.integers(0, 8), st.integers(0, 2), st.integers(0, 4),
)  # fmt: skip
def test_real_and_fake_versions_take_and_refuse_the_same(op, rows, text, kind, which, at, size):
    whole = arguments(op, rows, text)
    a = list(whole)
    a[which % len(a)] = damaged(a[which % len(a)], kind, at, size)
    try:
        got, refused = getattr(ops, op)(*a), ""
    except REFUSALS as error:
        refused = str(error)
        assert f"qcompile_triton::{op}: " in refused and "but must be" in refused, refused
    assert kind != "none" or not refused, refused
    with FakeTensorMode() as mode:
        try:
            shaped = getattr(ops, op)(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a))
        except REFUSALS:
            assert refused, "only the fake version refuses"
            return
    assert not refused, f"the fake version takes what the real one refuses: {refused}"
    for real, fake in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, shaped)), strict=True):
        assert real.shape == fake.shape and real.dtype == fake.dtype


def test_specs_of_other_kernels_and_columns_are_refused():
    x = torch.randn(2, 63).half()
    for spec, says in (
        ("sum_k/fp16", "spec is 'sum_k/fp16'"),
        ("row_quant/fp16/nonsense=1", "spec is 'row_quant/fp16/nonsense=1'"),
        ("row_quant/fp16/hadamard=64", "\\[.., 64\\], as the transform"),
    ):
        with pytest.raises(ValueError, match=f"qcompile_triton::row_quant: .*{says}|{says}"):
            triton_op_checks.check_row_quant(x, None, None, None, None, None, None, None, None, spec)
    with pytest.raises(ValueError, match="format is 'int4/tensor'.*a kernel reads"):
        triton_op_checks.check_linear_w(x, x, x, None, None, None, None, None, "int4/tensor", 63)
