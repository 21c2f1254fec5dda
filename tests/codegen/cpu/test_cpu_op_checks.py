"""Whatever the arguments, an operator of the CPU target gives the right value or refuses; it never crashes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_cases import FLOATS, INT8_OPS, OPS, assert_right, call, operands
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.cpu import cpu_op_checks, native_kernels

DTYPES = [*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
          torch.complex64, torch.float8_e4m3fn]  # fmt: skip
REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError)


@pytest.fixture(scope="module", autouse=True)
def loaded():
    native_kernels.load_native_kernels()


def restrided(t, kind):
    """The same values with other strides."""
    if kind == "columns first" and t.ndim > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "every other" and t.ndim:
        return torch.stack((t, torch.zeros_like(t)), -1).flatten(-2)[..., ::2]
    if kind == "unaligned":
        return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)
    if kind == "lone" and 1 in t.shape:  # the stride of a single row says nothing
        strides = [7 if size == 1 else stride for size, stride in zip(t.shape, t.contiguous().stride(), strict=True)]
        return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)
    return t


def damaged(t, kind, at, size):
    """Another shape, dtype or device."""
    if kind == "size" and t.ndim:
        shape = list(t.shape)
        shape[at % t.ndim] = [0, 1, shape[at % t.ndim] + 1, max(shape[at % t.ndim] - 1, 0), 64, 2 * shape[0]][size]
        return torch.zeros(shape, dtype=t.dtype)
    if kind == "rank":
        return [t[None], t.reshape(-1), t[..., None], t.new_zeros(())][size % 4]
    if kind == "dtype":
        return t.to(DTYPES[(at * 6 + size) % len(DTYPES)])
    if kind == "meta":
        return t.to("meta")
    return t


shapes = st.tuples(
    st.sampled_from([(0,), (1,), (2,), (5,), (8,), (9,), (13,), (17,), (2, 3), (1, 1)]),
    st.sampled_from([1, 2, 15, 16, 33, 64, 100, 130]), st.sampled_from([0, 1, 3, 16, 33, 70]),
    st.sampled_from([8, 32, 48, 128, 248]),
)  # fmt: skip
strides = st.sampled_from(["dense", "columns first", "every other", "unaligned", "lone"])
damages = st.sampled_from(["none", "size", "rank", "dtype", "meta", "group", "n"])


def tensors_of(a):
    return [name for name, value in a.items() if isinstance(value, torch.Tensor)]


@given(
    st.sampled_from(OPS),
    shapes,
    st.sampled_from([torch.int8, *FLOATS]),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.lists(strides, min_size=8, max_size=8),
    damages,
    st.integers(0, 7),
    st.integers(0, 2),
    st.integers(0, 5),
)
def test_a_call_is_right_or_refused(op, shape, x, dtype, bias, layouts, damage, which, at, size):  # fmt: skip
    x = torch.float32 if x == torch.int8 and op not in INT8_OPS else x
    a = operands(op, *shape, x=x, dtype=dtype, bias=bias)
    tensors = tensors_of(a)
    a |= {name: restrided(a[name], layout) for name, layout in zip(tensors, layouts, strict=False)}
    if damage in ("group", "n"):
        other = [0, -8, 2**63 - 8, 12, 256, 8][size]
        same = damage not in a or a[damage] == other
        a |= {damage: other} if damage in a else {}
    else:
        name = tensors[which % len(tensors)]
        before = a[name]
        a[name] = damaged(before, damage, at, size)
        same = (a[name].shape, a[name].dtype, a[name].device) == (before.shape, before.dtype, before.device)
    try:
        got, refused = call(op, a), ""
    except REFUSALS as error:
        refused = str(error)
    assert not (same and refused), refused
    if not refused:
        assert_right(op, a, got)
    else:
        assert f"qcompile_cpu::{op}: " in refused and ", but must be " in refused, refused
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in a.items()}
        try:
            shaped = call(op, fake)
        except REFUSALS as error:
            assert refused, f"only the fake version refuses: {error}"
            assert f"qcompile_cpu::{op}: " in str(error) and ", but must be " in str(error), error
        else:
            assert not refused, f"the fake version takes what the real one refuses: {refused}"
            assert shaped.shape == got.shape and shaped.dtype == got.dtype


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("op", OPS)
def test_operands_of_any_strides_are_read_right(op, rows):
    """One by one."""
    for x in {torch.int8 if op in INT8_OPS else torch.float32, torch.bfloat16}:
        a = operands(op, rows, 100, 33, x=x)
        for name in tensors_of(a):
            for kind in ("columns first", "every other", "unaligned"):
                b = a | {name: restrided(a[name], kind)}
                assert_right(op, b, call(op, b))


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


U8 = torch.uint8


@pytest.mark.parametrize(
    "op,name,value,says",
    [
        ("int8_linear", "x", zeros(9, 64), r"x is float32 \[9, 64\] on cpu.*int8 with x_scale"),
        ("int8_linear", "x", zeros(9, 64, dtype=U8), r"x is uint8 \[9, 64\] on cpu.*int8 with x_scale"),
        ("int8_linear", "x", zeros(9, 65, dtype=torch.int8), r"codes is uint8 \[2, 16, 16, 4\]"),
        ("int8_linear", "x", torch.zeros((), dtype=torch.int8), "but must be"),
        ("int8_linear", "x_scale", zeros(8, 1), r"x_scale is float32 \[8, 1\]"),
        ("int8_linear", "x_scale", zeros(9, 1).double(), r"x_scale is float64 \[9, 1\]"),
        ("int8_linear", "x_scale", None, r"x is int8 \[9, 64\] on cpu.*float"),
        ("int8_linear", "codes", zeros(2, 16, 16, 4, dtype=torch.int8), r"codes is int8.*uint8 \[2, 16, 16, 4\]"),
        ("int8_linear", "codes", zeros(1, 16, 16, 4, dtype=U8), r"codes is uint8 \[1, 16, 16, 4\].*\[2, 16, 16, 4\]"),
        ("int8_linear", "scale", zeros(5).bfloat16(), r"scale is bfloat16 \[5\].*float32"),
        ("int8_linear", "scale", zeros(6), r"scale is float32 \[6\].*5"),
        ("int8_linear", "bias", zeros(4), r"bias is float32 \[4\].*5"),
        ("int8_linear", "bias", zeros(5).bfloat16(), r"bias is bfloat16 \[5\].*float32"),
        ("int8_linear", "dtype", torch.float64, r"dtype is .*float64.*float32, bfloat16 or float16"),
        ("int8_linear", "dtype", torch.int32, r"dtype is .*int32.*float32, bfloat16 or float16"),
        ("int8_linear", "n", -1, r"n is -1.*0 or more"),
        ("int8_linear", "n", 33, "but must be"),
        ("dual_linear", "group", 256, r"group is 256.*multiple of 8, up to 248"),
        ("dual_linear", "group", 0, r"group is 0.*multiple of 8"),
        ("dual_linear", "group", 20, r"group is 20.*multiple of 8"),
        ("dual_linear", "group", 64, r"step is uint8 \[2, 2, 16\].*\[2, 1, 16\]"),
        ("dual_linear", "step", zeros(2, 2, 16), r"step is float32 \[2, 2, 16\].*uint8"),
        ("dual_linear", "step", zeros(2, 3, 16, dtype=U8), r"step is uint8 \[2, 3, 16\].*\[2, 2, 16\]"),
        ("dual_linear", "offset", zeros(2, 2, 16, 2, dtype=U8), r"offset is uint8 \[2, 2, 16, 2\].*\[2, 1, 16, 2\]"),
        ("dual_linear", "offset", zeros(2, 1, 16, 2), r"offset is float32.*uint8 \[2, 1, 16, 2\]"),
        ("group_linear", "zero", zeros(2, 1, 16), r"zero is float32 \[2, 1, 16\].*\[2, 2, 16\]"),
        ("group_linear", "step", zeros(2, 2, 16).double(), r"step is float64"),
        ("table_linear", "table", zeros(15), r"table is float32 \[15\].*\[16\]"),
        ("table_linear", "table", zeros(16).bfloat16(), r"table is bfloat16 \[16\].*float32"),
        ("table_linear", "x", zeros(9, 64, dtype=torch.int8), r"x is int8 \[9, 64\].*float"),
        ("table_linear", "zero", zeros(2, 2, 16, dtype=torch.int8), r"zero is int8 \[2, 2, 16\]"),
        ("int8_float_linear", "x", zeros(9, 64).double(), r"x is float64 \[9, 64\].*float"),
        ("int8_float_linear", "codes", zeros(2, 8, 16, 4, dtype=U8), r"codes is uint8 \[2, 8, 16, 4\].*\[2, 16, 1"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_argument_its_value_and_the_demand(op, name, value, says):
    """The real operator, and the fake one before a graph is compiled."""
    a = operands(op, 9, 64, 5)
    call(op, a)
    a[name] = value
    said = f"(?s)^qcompile_cpu::{op}: .*{says}"
    with pytest.raises(ValueError, match=said) as real:
        call(op, a)
    assert ", but must be " in str(real.value)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in a.items()}
        with pytest.raises(ValueError, match=said) as faked:
            call(op, fake)
    assert ", but must be " in str(faked.value)


def test_scales_beside_float_rows_are_refused():
    for op in INT8_OPS:
        a = operands(op, 9, 64, 5, x=torch.float32)
        with pytest.raises(ValueError, match=rf"{op}: x is float32 \[9, 64\].*int8 with x_scale"):
            call(op, a | {"x_scale": torch.ones(9, 1)})


@pytest.mark.parametrize("op", OPS)
def test_more_columns_than_int32_sums_have(op):
    a = operands(op, 1, 2**17 - 1, 1, 248)
    assert_right(op, a, call(op, a))
    a = operands(op, 1, 2**17, 1, 248)
    with pytest.raises(ValueError, match=rf"{op}: .*131071, where int32 sums are exact"):
        call(op, a)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="131071, where int32 sums are exact"):
        call(op, {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in a.items()})


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_on_several_devices_are_refused(op):
    with FakeTensorMode() as mode:
        a = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in operands(op, 2, 64, 5).items()}
        for name in tensors_of(a):
            moved = a | {name: torch.empty_like(a[name], device="cuda")}
            x_scale, x = moved.get("x_scale"), moved["x"]
            with pytest.raises(ValueError, match=f"qcompile_cpu::{op}: .* as x is"):
                of_groups = moved.get("step"), moved.get("zero")
                cpu_op_checks.check_linear(
                    op, x, x_scale, moved["codes"], (moved["scale"], moved["bias"]), 5, torch.float32,
                    moved.get("group", 0), of_groups, moved.get("offset"), moved.get("table"),
                )  # fmt: skip
