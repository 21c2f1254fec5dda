"""qcompile::low_rank_linear: the product, its gradients, and the state that its backward changes, in every mode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.ir.low_rank_ops import NOT_FOLDED
from qcompile.ir.projected_gradient_op import REFRESHES
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor

INT8, INT4 = "int8/group256/zero", "int4/group256/zero"


def arguments(rows, columns, *, quantized=True, rank=3, bias=True, dtype=torch.float32, low_dtype=None, tokens=(5,)):
    """x, then the rest of the operator's arguments."""
    length, left = min(rows, columns), rows < columns
    weight = torch.randn(rows, columns, dtype=dtype)
    codes, basis = (weight, None, None), (torch.zeros(rank, length, dtype=dtype), None, None)
    if quantized:
        codes = quantize_tensor(weight, Format.parse(INT8)).stored_parts[:3]
        basis = quantize_tensor(basis[0], Format.parse(INT4)).stored_parts[:3]
    low = torch.zeros((rank, columns) if left else (rows, rank), dtype=low_dtype or dtype, requires_grad=True)
    x = torch.randn(*tokens, columns, dtype=dtype, requires_grad=True)
    b = torch.randn(rows, dtype=dtype, requires_grad=True) if bias else None
    state = [torch.zeros(length, dtype=dtype), torch.zeros(2), torch.tensor([0, 4, 0, 1])]
    formats = (INT8, INT4) if quantized else ("", "")
    return [x, *codes, low, b, *basis, *state, *formats, 0.4, 2, dtype]


def call(args):
    return torch.ops.qcompile.low_rank_linear(*args)


def weight_of(args):
    if not args[12]:
        return args[1]
    return torch.ops.qcompile.dequantize(*args[1:4], None, args[12], args[0].shape[-1], args[-1])


def basis_of(args):
    length = args[9].shape[0]
    if not args[13]:
        return args[6]
    return torch.ops.qcompile.dequantize(*args[6:9], None, args[13], length, args[-1])


shapes = st.tuples(st.integers(3, 20), st.integers(3, 20))


@given(shape=shapes, quantized=st.booleans(), bias=st.booleans(), tokens=st.sampled_from([(5,), (2, 3), ()]))
def test_product_and_gradients(shape, quantized, bias, tokens):
    """y = x W^T + b, dx = g W, db = sum g, and dL is the gradient of W in the basis that it gave."""
    args = arguments(*shape, quantized=quantized, bias=bias, tokens=tokens, dtype=torch.float64)
    out = call(args)
    x, low, b = args[0], args[4], args[5]
    plain = weight_of(args).clone().requires_grad_()
    expected = torch.nn.functional.linear(x, plain, b)
    assert torch.allclose(out, expected)
    g = torch.randn_like(out)
    inputs = [t for t in (x, low, b) if t is not None]
    dx, dlow, *db = torch.autograd.grad(out, inputs, g)
    ex, ew, *eb = torch.autograd.grad(expected, [t for t in (x, plain, b) if t is not None], g)
    basis = basis_of(args)
    assert torch.allclose(dx, ex) and all(torch.allclose(a, c) for a, c in zip(db, eb, strict=True))
    assert basis.any()
    projected = basis @ ew if shape[0] < shape[1] else ew @ basis.t()
    assert torch.allclose(dlow, projected, atol=1e-12)


def test_the_full_gradient_is_made_for_a_refresh_only(monkeypatch):
    args = arguments(9, 6)
    call(args).sum().backward()

    def fail(*_, **__):
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    call(args).sum().backward()
    args[11][3] = 1
    with pytest.raises(AssertionError, match="decomposed"):
        call(args).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_the_result_may_be_changed_in_place(bias):
    args = arguments(9, 6, tokens=(2, 3), bias=bias)
    out = call(args)
    expected = 2 * out.detach()
    out *= 2
    assert torch.equal(out, expected)
    out.sum().backward()
    assert torch.allclose(args[0].grad, 2 * weight_of(args).sum(0).expand(2, 3, 6), atol=1e-5)


def test_frozen_inputs_and_biases():
    args = arguments(9, 6)
    args[0], args[5] = args[0].detach(), args[5].detach()
    call(args).sum().backward()
    assert args[4].grad is not None and args[0].grad is None
    args[4] = args[4].detach()
    assert not call(args).requires_grad


def test_a_step_without_a_fold_is_refused():
    args = arguments(9, 6)
    with torch.no_grad():
        args[4][0, 0] = 1e-9
    with pytest.raises(ValueError, match="the optimizer stepped without a fold") as error:
        call(args)
    assert str(error.value) == NOT_FOLDED


def both_calls(function, args):
    """Two backward passes of a function that calls the operator twice, on one weight: gradients and state."""
    found = []
    for _ in range(2):
        args[11][3] = 1
        for tensor in (args[0], args[4], args[5]):
            tensor.grad = None
        function(*args).square().mean().backward()
        found += [args[0].grad.clone(), args[4].grad.clone(), args[5].grad.clone()]
    return found + [part.clone() for part in args[6:12] if part is not None]


def chained(*args):
    x = torch.ops.qcompile.low_rank_linear(*args)
    return torch.ops.qcompile.low_rank_linear(torch.relu(x), *args[1:])


def checkpointed(*args):
    return torch.utils.checkpoint.checkpoint(chained, *args, use_reentrant=False)


def fresh():
    torch.manual_seed(1)
    return arguments(8, 8, dtype=torch.float32)


@pytest.mark.parametrize("function", [chained, checkpointed])
def test_one_refresh_a_backward(function):
    """Also where a module is called twice, and where checkpointing calls it again."""
    args = fresh()
    found = both_calls(function, args)
    assert args[11][REFRESHES] == 2
    assert all(torch.equal(a, b) for a, b in zip(found, both_calls(chained, fresh()), strict=True))


@pytest.mark.parametrize("function", [chained, checkpointed])
@pytest.mark.parametrize("dynamic", [False, True])
def test_aot_eager_is_eager(function, dynamic):
    compiled = both_calls(torch.compile(function, backend="aot_eager", dynamic=dynamic), fresh())
    assert all(torch.equal(a, b) for a, b in zip(compiled, both_calls(function, fresh()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("function", [chained, checkpointed])
def test_inductor_is_eager(function):
    args = fresh()
    compiled = both_calls(torch.compile(function, dynamic=True), args)
    assert args[11][REFRESHES] == 2
    for a, b in zip(compiled, both_calls(function, fresh()), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The product and dx in half, dL in float32."""
    args = arguments(9, 6, low_dtype=torch.float32)
    args[-1] = dtype
    out = call(args)
    out.float().sum().backward()
    assert out.dtype == dtype and args[4].grad.dtype == torch.float32 and args[0].grad.dtype == torch.float32
    exact = torch.nn.functional.linear(args[0], weight_of([*args[:-1], torch.float32]), args[5])
    assert torch.allclose(out.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("index", "value", "name"),
    [
        (0, torch.randn(5, 7), "weight"),
        (1, torch.zeros(9, 6, dtype=torch.int8), "weight"),
        (4, torch.zeros(3, 9), "low"),
        (5, torch.zeros(8), "bias"),
        (11, torch.zeros(4), "schedule"),
        (12, "int9", "format"),
        (16, torch.int8, "dtype"),
    ],
)
def test_arguments_that_do_not_fit(index, value, name):
    args = arguments(9, 6)
    args[index] = value
    with pytest.raises(ValueError, match=f"qcompile::low_rank_linear: {name} is"):
        call(args)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("quantized", [True, False])
def test_the_operator_is_well_formed(shape, quantized):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    op = torch.ops.qcompile.low_rank_linear.default
    torch.library.opcheck(op, arguments(*shape, quantized=quantized), test_utils=tests)
