"""Whatever the arguments, an operator of the CPU target gives the value of plain torch or refuses; it never crashes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.codegen.cpu import cpu_op_checks, native_kernels
from qcompile.numerics import int8_matmul

OPS = ["int8_mm", "dual_mm", "int8_float", "nibble_float"]
NAMES = {
    "int8_mm": ["x", "x_scale", "weight", "scale", "bias", "dtype"],
    "dual_mm": ["x", "x_scale", "nibbles", "group_scale", "zero", "scale", "bias", "dtype"],
    "int8_float": ["x", "weight"],
    "nibble_float": ["x", "nibbles", "a", "c"],
}
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
          torch.float8_e4m3fn]  # fmt: skip
REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError)


def operands(op, m, k, n, group, dtype, with_bias):
    """Arguments that fit, by name; M, K and N may be zero, and the group may be beyond K.

    Group scales and zero points are those of which all codes make int8 values, as the two-level formats demand.
    """
    groups, half = -(-k // group), group // 2
    ints = lambda low, high, *shape, dtype=torch.int8: torch.randint(low, high, shape).to(dtype)  # noqa: E731
    scales = {"x_scale": torch.rand(m, 1), "scale": torch.rand(n, 1)}
    scales["bias"] = torch.randn(n).to(dtype) if with_bias else None
    nibbles = ints(0, 256, n, groups, half, dtype=torch.uint8)
    every = {
        "int8_mm": {"x": ints(-128, 128, m, k), "weight": ints(-128, 128, n, k), **scales, "dtype": dtype},
        "dual_mm": {
            "x": ints(-128, 128, m, k), "nibbles": nibbles, "group_scale": ints(0, 9, n, groups),
            "zero": ints(0, 8, n, groups, dtype=torch.uint8), **scales, "dtype": dtype,
        },
        "int8_float": {"x": torch.randn(m, k).to(dtype), "weight": ints(-128, 128, n, k)},
        "nibble_float": {
            "x": torch.randn(m, k).to(dtype), "nibbles": nibbles, "a": torch.rand(n, groups),
            "c": torch.randn(n, groups),
        },
    }  # fmt: skip
    return {name: every[op][name] for name in NAMES[op]}


def reference(op, a):
    """The product in float64. It raises where sizes do not agree."""
    x, k = a["x"].double(), a["x"].shape[1]
    if "weight" in a:
        weight = a["weight"].double()
    else:
        nibbles = a["nibbles"]
        n, groups, half = nibbles.shape
        assert groups == -(-k // (2 * half))
        codes = torch.cat((nibbles & 15, nibbles >> 4), -1).double()  # [N, groups, G]
        if op == "dual_mm":
            s, z = a["group_scale"].double()[..., None], a["zero"].double()[..., None]
            codes = (codes - z) * s
        else:
            codes = codes * a["a"].double()[..., None] - a["c"].double()[..., None]
        weight = codes.reshape(n, groups * 2 * half)[:, :k]
    out = torch.einsum("mk,nk->mn", x, weight)
    if "scale" not in a:
        return out, x.abs() @ (weight.abs() + 128).t()  # int8 bytes are read as w + 128
    assert a["x_scale"].shape == (len(x), 1) and a["scale"].shape == (len(weight), 1)
    out = out * a["x_scale"].double() * a["scale"].double().t()
    assert a["bias"] is None or a["bias"].shape == (len(weight),)
    return (out if a["bias"] is None else out + a["bias"].double()), out.abs() + 2


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
    st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 17]), st.sampled_from([0, 1, 2, 15, 16, 33, 64, 100, 130]),
    st.sampled_from([0, 1, 3, 16, 33, 70]), st.sampled_from([32, 64, 128, 192]),
)  # fmt: skip
strides = st.sampled_from(["dense", "columns first", "every other", "unaligned", "lone"])
damages = st.sampled_from(["none", "size", "rank", "dtype", "meta"])


def check_value(op, a, got):
    want, size = reference(op, a)
    dtype = a.get("dtype", a["x"].dtype)
    assert got.shape == want.shape and got.dtype == dtype and got.is_contiguous()
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}[dtype]
    rounding = max(rounding, 2e-6) if op == "nibble_float" else rounding  # its weight is float32 values
    finite = got.isfinite() | (dtype != torch.float16)  # which reaches to 65504
    assert bool(((got.double() - want).abs() <= rounding * (size + 1))[finite].all())


def call(op, a):
    return getattr(torch.ops.qcompile_cpu, op)(*a.values())


@given(
    st.sampled_from(OPS),
    shapes,
    st.sampled_from(FLOATS),
    st.booleans(),
    st.booleans(),
    st.lists(strides, min_size=8, max_size=8),
    damages,
    st.integers(0, 7),
    st.integers(0, 2),
    st.integers(0, 5),
)
def test_a_call_is_right_or_refused(op, shape, dtype, bias, fast, layouts, damage, which, at, size):  # fmt: skip
    a = operands(op, *shape, dtype, bias)
    tensors = [name for name, value in a.items() if isinstance(value, torch.Tensor)]
    a |= {name: restrided(a[name], layout) for name, layout in zip(tensors, layouts, strict=False)}
    name = tensors[which % len(tensors)]
    before = a[name]
    a[name] = damaged(before, damage, at, size)
    same = (a[name].shape, a[name].dtype, a[name].device) == (before.shape, before.dtype, before.device)
    with (
        mock.patch.object(native_kernels, "has_fast_int8_matmul", lambda: fast),
        mock.patch.object(int8_matmul, "has_fast_int8_matmul", lambda: fast),
    ):
        try:
            got, refused = call(op, a), ""
        except REFUSALS as error:
            refused = str(error)
    assert not (same and refused), refused
    if not refused:
        check_value(op, a, got)
    else:
        assert f"qcompile_cpu::{op}: " in refused and ", but must be " in refused, refused
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in a.items()}
        try:
            shaped = call(op, fake)
        except REFUSALS:
            assert refused, "only the fake version refuses"
        else:
            assert not refused, "the fake version takes what the real one refuses"
            assert shaped.shape == got.shape and shaped.dtype == got.dtype


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("op", OPS)
def test_operands_of_any_strides_are_read_right(op, rows):
    """One by one, for small M and large M; the bias in another dtype too."""
    a = operands(op, rows, 100, 33, 32, torch.float32, True)
    check_value(op, a, call(op, a))
    for name in [name for name, value in a.items() if isinstance(value, torch.Tensor)]:
        for kind in ("columns first", "every other", "unaligned"):
            b = a | {name: restrided(a[name], kind)}
            check_value(op, b, call(op, b))
    if "bias" in a:
        b = a | {"bias": a["bias"].bfloat16()}
        check_value(op, b, call(op, b))


@pytest.mark.parametrize(
    "op,name,value,says",
    [
        ("int8_mm", "weight", torch.zeros(5, 63, dtype=torch.int8), r"x is int8 \[9, 64\].*int8 \[M, 63\]"),
        ("int8_mm", "x", torch.zeros(9, 64), r"x is float32 \[9, 64\] on cpu, but must be int8 \[M, 64\]"),
        ("int8_mm", "x_scale", torch.ones(8, 1), r"x_scale is float32 \[8, 1\].*float32 \[9, 1\]"),
        ("int8_mm", "scale", torch.ones(5, 1).bfloat16(), r"scale is bfloat16 \[5, 1\].*float32 \[5, 1\]"),
        ("int8_mm", "bias", torch.ones(4), r"bias is float32 \[4\].*float \[5\], or None"),
        ("int8_mm", "dtype", torch.int32, r"dtype is torch.int32.*float32, bfloat16"),
        ("dual_mm", "nibbles", torch.zeros(5, 1, 16, dtype=torch.uint8), r"nibbles.*\[N, 2, 16\]: 2 groups of 32"),
        ("dual_mm", "nibbles", torch.zeros(5, 4, 8, dtype=torch.uint8), "nibbles.*multiple of 16"),
        ("dual_mm", "nibbles", torch.zeros(5, 64, 0, dtype=torch.uint8), "nibbles.*multiple of 16"),
        ("dual_mm", "group_scale", torch.zeros(5, 3, dtype=torch.int8), r"group_scale.*int8 \[5, 2\]"),
        ("dual_mm", "zero", torch.zeros(5, 2, dtype=torch.int8), r"zero.*uint8 \[5, 2\]"),
        ("int8_float", "x", torch.zeros(64), r"x is float32 \[64\].*float \[M, 64\]"),
        ("int8_float", "weight", torch.zeros(5, 64), r"weight is float32 \[5, 64\].*int8 \[N, K\]"),
        ("nibble_float", "a", torch.zeros(5, 2).double(), r"a is float64 \[5, 2\].*float32 \[5, 2\]"),
        ("int8_float", "weight", None, "weight is None, but must be a tensor"),
        ("int8_mm", "x_scale", None, "x_scale is None, but must be a tensor"),
        ("nibble_float", "c", torch.zeros(5, 1), r"c is float32 \[5, 1\].*float32 \[5, 2\]"),
    ],
)
def test_a_refusal_names_the_argument_its_value_and_the_demand(op, name, value, says):
    a = operands(op, 9, 64, 5, 32, torch.float32, True)
    call(op, a)
    with pytest.raises(ValueError, match=f"qcompile_cpu::{op}: {says}"):
        call(op, a | {name: value})


def test_integer_sums_beyond_int32_are_refused():
    for op, weight in (
        ("int8_mm", {"weight": torch.zeros(1, 2**17, dtype=torch.int8)}),
        ("dual_mm", {"nibbles": torch.zeros(1, 1, 2**16, dtype=torch.uint8)}),
    ):
        a = operands(op, 1, 64, 1, 32, torch.float32, False) | weight | {"x": torch.zeros(1, 2**17, dtype=torch.int8)}
        with pytest.raises(ValueError, match="K up to 131071"):
            call(op, a)


def test_fake_tensors_on_several_devices_are_refused():
    with FakeTensorMode():
        x, w = torch.zeros(2, 64), torch.zeros(5, 64, dtype=torch.int8)
        with pytest.raises(ValueError, match="on cpu, as x is"):
            cpu_op_checks.check_devices("int8_float", x, w, None, torch.zeros(1, device="cuda"))
        with pytest.raises(ValueError, match="on a CPU"):
            cpu_op_checks.check_devices("int8_float", torch.zeros(1, device="cuda"), w)
