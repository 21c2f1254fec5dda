"""Our operators: opcheck, and the fused ones against quantize and dequantize apart."""

from __future__ import annotations

import pytest
import torch

import qcompile.ir.ops  # noqa: F401
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

ops = torch.ops.qcompile
WEIGHTS = ["int8/row", "int8/row/zero", "int4/group32", "int4/group32/zero", "int4/group32/floatzero",
           "int4/group32/zero/dual", "int3/group32/zero", "int2/group16", "fp8/row", "int4/row"]  # fmt: skip
ACTS = ["", "int8/row", "int8/tensor", "int8/row/zero", "int4/row", "int8/group32", "fp8/row"]


def arguments(weight, act, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    n, k = 10, 80
    form = Format.parse(weight)
    q = quantize_tensor(torch.randn(n, k), form)
    x, x_scale, x_zero = torch.randn(2, 3, k).to(dtype), None, None
    if act:
        x, x_scale, x_zero = ops.quantize(x, act)
        x_zero = x_zero if x_zero.numel() else None
    b = torch.randn(n) if bias else None
    return (x, x_scale, x_zero, *q.stored_parts, b, weight, act, k, dtype)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_qlinear_is_linear_of_dequantized(weight, act):
    a = arguments(weight, act)
    x = ops.dequantize(a[0], a[1], a[2], None, act, 0, torch.float32) if act else a[0]
    w = ops.dequantize(a[3], a[4], a[5], a[6], weight, a[10], torch.float32)
    want = torch.nn.functional.linear(x.double(), w.double(), a[7].double())
    assert torch.allclose(ops.qlinear(*a).double(), want, rtol=1e-5, atol=1e-4)


def test_integer_sums_are_exact():
    a = arguments("int8/row", "int8/row", torch.float64, bias=False)
    want = (a[0].double() @ a[3].double().t()) * a[1].double() * a[4].double().reshape(-1)
    assert torch.equal(ops.qlinear(*a), want)


@pytest.mark.parametrize(
    "weight,act",
    [
        ("int8/row", "int8/row"),
        ("int4/group32/zero/dual", "int8/row"),
        ("int4/group32", ""),
    ],  # opcheck itself cannot compare fp8
)
def test_opcheck(weight, act):
    torch.library.opcheck(ops.qlinear.default, arguments(weight, act))
    a = arguments(weight, act)
    torch.library.opcheck(ops.dequantize.default, (a[3], a[4], a[5], a[6], weight, a[10], torch.float32))


@pytest.mark.parametrize("act", [a for a in ACTS if a])
def test_opcheck_quantize(act):
    torch.library.opcheck(ops.quantize.default, (torch.randn(2, 3, 64), act))


def test_opcheck_hadamard():
    torch.library.opcheck(ops.hadamard.default, (torch.randn(2, 12), torch.ones(12)))


@pytest.mark.parametrize(
    "form",
    [
        "int8",
        "int4/group32/zero",
        "int4/group32/zero/dual",
        "int4/group32/dual",
        "fp8",
        "fp4/group32/m2",
        "int8/tensor",
    ],
)
def test_the_operator_is_the_product_of_each_experts_rows(form):
    form, (e, n, k) = Format.parse(form), (4, 6, 64)
    weight, x = torch.randn(e * n, k), torch.randn(9, k)
    q = quantize_tensor(weight, form)
    stacked = [None if t is None else t if not t.ndim else t.unflatten(0, (e, n)) for t in q.stored_parts]
    ends = torch.tensor([3, 3, 7, 8], dtype=torch.int32)  # no row for the second expert, no expert for the last row
    got = torch.ops.qcompile.qexperts(x, None, None, ends, *stacked, str(form), "", k, torch.float32)
    values = q.dequantize().unflatten(0, (e, n))
    expert_of = [0, 0, 0, 2, 2, 2, 2, 3]
    want = torch.stack([values[o] @ row for o, row in zip(expert_of, x, strict=False)])
    assert torch.allclose(got[:8], want, atol=1e-5) and not got[8].any()
    if form.dtype != "fp8":  # torch has no arithmetic of its own on these, which the check uses
        arguments = (x, None, None, ends, *stacked, str(form), "", k, torch.float32)
        torch.library.opcheck(torch.ops.qcompile.qexperts, arguments)


@pytest.mark.parametrize("form", ["int8", "int4/row", "int4/group32/zero/dual", "int8/tensor", "int4/group32/zero"])
@pytest.mark.parametrize("act", ["int8", "int8/tensor", "int8/group32", "int8/row/zero"])
def test_codes_by_experts_are_what_qlinear_makes_of_each_experts_rows(form, act):
    """The same bits: exact integer sums where both sides have one scale a row."""
    form, (e, n, k) = Format.parse(form), (3, 6, 64)
    stack = [quantize_tensor(torch.randn(n, k), form).stored_parts for _ in range(e)]
    if form.per == "tensor":  # which all experts share
        stack = [(codes, stack[0][1], zero, group) for codes, _, zero, group in stack]
    stacked = [None if t[0] is None else torch.stack(t) if t[0].ndim else t[0] for t in zip(*stack, strict=True)]
    x, x_scale, x_zero = torch.ops.qcompile.quantize(torch.randn(9, k), act)
    x_zero = x_zero if "zero" in act else None
    ends = torch.tensor([3, 3, 8])
    got = torch.ops.qcompile.qexperts(x, x_scale, x_zero, ends, *stacked, str(form), act, k, torch.float32)
    for expert, rows in ((0, slice(0, 3)), (2, slice(3, 8))):
        own = [None if t is None else t[rows] if t.ndim else t for t in (x, x_scale, x_zero)]
        want = torch.ops.qcompile.qlinear(*own, *stack[expert], None, str(form), act, k, torch.float32)
        assert torch.equal(got[rows], want)
    assert not got[8].any()


@pytest.mark.parametrize("form", ["int8/row", "int8/row/zero", "int4/group4/zero", "fp8/row"])
def test_codes_and_scales_are_contiguous_whatever_the_activation_is(form):
    x = torch.randn(6, 5, 8).transpose(0, 1)
    found, plain = torch.ops.qcompile.quantize(x, form), torch.ops.qcompile.quantize(x.contiguous(), form)
    for got, want in zip(found, plain, strict=True):
        assert got.is_contiguous() and torch.equal(got.float(), want.float())
