"""Whatever the arguments, an operator of the dialect gives the value of plain torch or refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile.ir.ops  # noqa: F401
from qcompile.ir import op_checks
from qcompile.numerics.format import Format
from qcompile.numerics.fp4 import decode_e2m1
from qcompile.numerics.qtensor import unpack_codes
from qcompile.numerics.rounding import quantize_tensor

ops = torch.ops.qcompile
WEIGHTS = ["int8", "int8/row/zero", "int8/tensor", "int4/group32", "int4/group32/zero", "int4/group4096/floatzero",
           "int4/group32/zero/dual", "int4/group512/dual", "int3/group32/zero", "int2/group8", "fp8", "fp4/group16/m2",
           "fp4/row", "int4/tensor/zero"]  # fmt: skip
ACTS = ["", "int8", "int8/tensor", "int8/row/zero", "int4/row", "int8/group32", "int8/group32/smooth", "fp8"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.uint8, torch.int32, torch.int64, torch.complex64]
REFUSALS = (ValueError, RuntimeError, NotImplementedError, TypeError)


def tensors_of(q, prefix=""):
    return {f"{prefix}scale": q.scale, f"{prefix}zero": q.zero, f"{prefix}group_scale": q.group_scale}


def qlinear_arguments(m, k, n, weight, act, dtype, bias):
    q = quantize_tensor(torch.randn(n, k), Format.parse(weight))
    x, x_scale, x_zero = torch.randn(*m, k).to(dtype), None, None
    if act:
        x, x_scale, x_zero = ops.quantize(x, act)
        x_zero = x_zero if "zero" in act else None
    return {"x": x, "x_scale": x_scale, "x_zero": x_zero, "weight": q.stored(), **tensors_of(q),
            "bias": torch.randn(n).to(dtype) if bias else None, "format": weight, "act": act, "columns": k,
            "dtype": dtype}  # fmt: skip


def qexperts_arguments(rows, k, n, weight, act, dtype):
    experts = 3
    x, x_scale, x_zero = torch.randn(rows, k).to(dtype), None, None
    if act:
        x, x_scale, x_zero = ops.quantize(x, act)
        x_zero = x_zero if "zero" in act else None
    q = quantize_tensor(torch.randn(experts * n, k), Format.parse(weight))
    parts = {"weight": q.stored(), **tensors_of(q)}
    parts = {name: t.unflatten(0, (experts, n)) if t is not None and t.ndim else t for name, t in parts.items()}
    ends = torch.randint(0, rows + 1, (experts,)).sort().values
    return {"x": x, "x_scale": x_scale, "x_zero": x_zero, "ends": ends, **parts, "format": weight, "act": act,
            "columns": k, "dtype": dtype}  # fmt: skip


def dequantized(codes, scale, zero, group_scale, text, columns, packed=True):
    """Values by an index into the scales of each column. It raises where shapes do not agree."""
    form = Format.parse(text)
    codes = unpack_codes(codes, form, columns) if packed else codes
    values = decode_e2m1(codes).double() if form.dtype == "fp4" else codes.double()
    column = torch.arange(columns) // (form.group or max(columns, 1))

    def spread(t, last):
        if form.per == "tensor":
            return t.double().reshape(())
        return t.double().broadcast_to((*codes.shape[:-1], last))[
            ..., column if last != 1 or form.group else 0 * column
        ]

    groups = form.groups(columns)
    if zero is not None:
        values = values - spread(zero, groups)
    if form.two_level:
        factor = group_scale if form.dual else torch.exp2(group_scale.double())
        return values * spread(factor, groups) * scale.double()
    return values * spread(scale, groups)


def qlinear_value(a):
    x = a["x"].double()
    if a["act"]:
        x = dequantized(a["x"], a["x_scale"], a["x_zero"], None, a["act"], a["columns"], packed=False)
    w = dequantized(a["weight"], a["scale"], a["zero"], a["group_scale"], a["format"], a["columns"])
    out = torch.einsum("...k,nk->...n", x, w)
    if a["bias"] is not None:
        assert a["bias"].shape == out.shape[-1:]
        out = out + a["bias"].double()
    return out, torch.einsum("...k,nk->...n", x.abs(), w.abs())


def qexperts_value(a):
    w = dequantized(a["weight"], a["scale"], a["zero"], a["group_scale"], a["format"], a["columns"])
    x, ends = a["x"].double(), a["ends"].tolist()
    if a["act"]:
        x = dequantized(a["x"], a["x_scale"], a["x_zero"], None, a["act"], a["columns"], packed=False)
    assert len(ends) == len(w)
    expert = torch.bucketize(torch.arange(len(x)), torch.tensor(ends), right=True)
    own = torch.cat((w, torch.zeros_like(w[:1])))[expert]
    return torch.einsum("sk,snk->sn", x, own), torch.einsum("sk,snk->sn", x.abs(), own.abs())


def damaged(t, kind, at, size):
    if kind == "size" and t.ndim:
        shape = list(t.shape)
        shape[at % t.ndim] = [0, 1, shape[at % t.ndim] + 1, max(shape[at % t.ndim] - 1, 0), 64, 2 * shape[0]][size]
        return torch.zeros(shape).to(t.dtype)
    if kind == "rank":
        return [t[None], t.reshape(-1), t[..., None], t.new_zeros(())][size % 4]
    if kind == "dtype":
        return t.to(DTYPES[(at * 6 + size) % len(DTYPES)])
    if kind == "strides" and t.ndim:
        return torch.stack((t, torch.zeros_like(t)), -1).flatten(-2)[..., ::2]
    return t


def check_call(op, a, value, name, kind, at, size):
    """One call with a damaged argument: refused by real and fake versions, or right."""
    before = a[name]
    if kind == "None":
        a[name] = None
    elif isinstance(before, torch.Tensor):
        a[name] = damaged(before, kind, at, size)
    elif kind != "none" and name in ("format", "act"):
        a[name] = [*WEIGHTS, "", "int5/row", "int4/group0", "int8/row/dual"][at * 6 + size]
    elif kind != "none" and name == "columns":
        a[name] = [0, -1, 1, before + 1, before - 1, 10**9][size]
    after = a[name]
    same = after is before or (
        isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
        and (before.shape, before.dtype) == (after.shape, after.dtype)
    )  # fmt: skip
    try:
        got, refused = op(*a.values()), ""
    except REFUSALS as error:
        refused = str(error)
    with FakeTensorMode() as mode:
        try:
            shaped = op(*(mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in a.values()))
        except REFUSALS:
            assert refused, "only the fake version refuses"
        else:
            assert not refused, f"the fake version takes what the real one refuses: {refused}"
            assert (
                shaped.shape == got.shape
                and shaped.dtype == got.dtype
                and (shaped.stride() == got.stride() or not got.numel())
            )
    if refused:
        assert not same, refused
        assert refused.startswith(op.name()), refused
        return
    want, scale = value(a)
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-6}[a["dtype"]]
    assert got.shape == want.shape and got.dtype == a["dtype"]
    assert bool(((got.double() - want).abs() <= rounding * (scale + 1)).all())


sizes = st.tuples(st.sampled_from([(1,), (0,), (2, 3), (), (20,), (1, 1), (2, 0)]), st.sampled_from([1, 2, 31, 32, 80]),
                  st.sampled_from([1, 0, 5, 12]))  # fmt: skip
kinds = st.sampled_from(["none", "size", "rank", "dtype", "strides", "None"])


@given(sizes, st.sampled_from(WEIGHTS), st.sampled_from(ACTS), st.sampled_from(FLOATS), st.booleans(), kinds,
       st.integers(0, 11), st.integers(0, 2), st.integers(0, 5))  # fmt: skip
def test_qlinear_is_right_or_refused(size, weight, act, dtype, bias, kind, which, at, by):
    a = qlinear_arguments(*size, weight, act, dtype, bias)
    check_call(ops.qlinear.default, a, qlinear_value, list(a)[which], kind, at, by)


@given(sizes, st.sampled_from(WEIGHTS), st.sampled_from(ACTS), st.sampled_from(FLOATS), kinds, st.integers(0, 11),
       st.integers(0, 2), st.integers(0, 5))  # fmt: skip
def test_qexperts_is_right_or_refused(size, weight, act, dtype, kind, which, at, by):
    (m, k, n) = size
    a = qexperts_arguments(m[0] if m else 7, k, max(n, 1), weight, act, dtype)
    check_call(ops.qexperts.default, a, qexperts_value, list(a)[which], kind, at, by)


@given(sizes, st.sampled_from(WEIGHTS), st.sampled_from(FLOATS), kinds, st.integers(0, 6), st.integers(0, 2),
       st.integers(0, 5))  # fmt: skip
def test_dequantize_is_right_or_refused(size, weight, dtype, kind, which, at, by):
    (m, k, n) = size
    q = quantize_tensor(torch.randn(*m, max(n, 1), k), Format.parse(weight))
    a = {"codes": q.stored(), **tensors_of(q), "format": weight, "columns": k, "dtype": dtype}

    def value(a):
        if not a["columns"]:  # codes that are not packed
            a = a | {"columns": a["codes"].shape[-1], "codes": a["codes"]}
            if Format.parse(a["format"]).bits < 8:
                pytest.fail("packed codes were taken for others")
        out = dequantized(a["codes"], a["scale"], a["zero"], a["group_scale"], a["format"], a["columns"])
        return out, out.abs()

    if kind != "none" and list(a)[which] == "columns" and by == 0:
        return  # columns = 0 says that codes are not packed: a call of another kind
    check_call(ops.dequantize.default, a, value, list(a)[which], kind, at, by)


@given(sizes, st.sampled_from([a for a in ACTS if a]), st.sampled_from(DTYPES))
def test_quantize_is_right_or_refused(size, act, dtype):
    (m, k, _) = size
    x = torch.randn(*m, k).to(dtype)
    if dtype not in FLOATS:
        with pytest.raises(ValueError, match="qcompile::quantize: x is"):
            ops.quantize(x, act)
        return
    codes, scale, zero = ops.quantize(x, act)
    with FakeTensorMode() as mode:
        for real, fake in zip((codes, scale, zero), ops.quantize(mode.from_tensor(x), act), strict=True):
            assert real.shape == fake.shape and real.dtype == fake.dtype
    back = ops.dequantize(codes, scale, zero if "zero" in act else None, None, act, 0, torch.float64)
    bound = {"int8": 0.01, "int4": 0.16, "fp8": 0.07}[act.split("/")[0]]
    assert not x.numel() or (back - x.double()).abs().max() <= bound * x.double().abs().max()


@given(st.lists(st.integers(0, 12), max_size=3), st.lists(st.integers(0, 12), max_size=2), st.sampled_from(DTYPES))
def test_hadamard_is_orthogonal_or_refused(shape, signs, dtype):
    x, s = torch.randn(shape).to(dtype), torch.ones(signs)
    fits = dtype in FLOATS and shape and signs == [shape[-1]] and shape[-1] in (1, 2, 4, 8, 12)
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(x), mode.from_tensor(s)
    for real in (True, False):
        if fits and real:
            twice = ops.hadamard(x, s)
            norms = (t.double().norm(dim=-1) for t in (x, twice))
            assert twice.shape == x.shape and torch.allclose(*norms, rtol=2e-2)
        elif not fits:
            with pytest.raises(ValueError, match="qcompile::hadamard: (x|signs) is"):
                ops.hadamard(x, s) if real else ops.hadamard(*fakes)


@pytest.mark.parametrize("ends", [[3, 2, 7], [0, 5, 8], [-1, 3, 7]])
def test_ends_of_experts_that_do_not_rise_are_refused(ends):
    a = qexperts_arguments(7, 32, 4, "int8", "int8", torch.float32) | {"ends": torch.tensor(ends)}
    with pytest.raises(ValueError, match=r"qexperts: ends is \[.*rising from 0 to at most 7"):
        ops.qexperts(*a.values())
    op_checks.check_ends([0, 3, 7], 7)


def test_two_levels_of_scales_are_not_for_activations():
    with pytest.raises(ValueError, match="format is 'int4/group32/dual'.*single level"):
        ops.quantize(torch.randn(2, 64), "int4/group32/dual")


def test_symbolic_rows_need_no_guard():
    """One graph for every number of rows; the arguments' rows agree symbolically."""
    a = qlinear_arguments((6,), 64, 5, "int8", "int8", torch.float32, True)

    def run(x, scale):
        return ops.qlinear(x, scale, *list(a.values())[2:])

    compiled = torch.compile(run, backend="eager", dynamic=True, fullgraph=True)
    for rows in (6, 9, 2):
        x, scale, _ = ops.quantize(torch.randn(rows, 64), "int8")
        with torch.compiler.set_stance("fail_on_recompile" if rows != 6 else "default"):
            assert torch.equal(compiled(x, scale), run(x, scale))
