"""Operators that train in fixed point: opcheck, and both directions against roundings around PyTorch's products."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from fixed_point_cases import conv_arguments, linear_arguments, meaning, state
from hypothesis import given
from hypothesis import strategies as st

from qcompile.numerics.fixed_point_format import FixedPointFormat

ops = torch.ops.qcompile
F = torch.nn.functional
OPS = {"linear": (ops.fixed_point_linear, linear_arguments), "conv": (ops.fixed_point_conv, conv_arguments)}
each_op = pytest.mark.parametrize("kind", list(OPS))


@pytest.mark.parametrize("ranges", ["sigma", "learned"])
@each_op
def test_opcheck(kind, ranges):
    op, arguments = OPS[kind]
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")  # the backward mutates state
    torch.library.opcheck(op.default, tuple(arguments(ranges=ranges)), test_utils=utils)


@given(
    st.sampled_from(["linear", "conv1d", "conv2d"]), st.integers(2, 8), st.integers(2, 8), st.integers(2, 8),
    st.booleans(), st.sampled_from(["sigma", "max"]), st.sampled_from([0.0, 0.4]),
    st.sampled_from(["stochastic", "nearest"]), st.integers(0, 999),
)  # fmt: skip
def test_meaning(kind, weight_bits, act_bits, gradient_bits, signed, ranges, gamma, rounding, seed):
    """Forward and all three gradients are those of the graph of roundings, in float64."""
    torch.manual_seed(seed)
    fields = dict(
        weight_bits=weight_bits, act_bits=act_bits, gradient_bits=gradient_bits, signed=signed, ranges=ranges,
        rounding=rounding, stream=seed,
    )  # fmt: skip
    if kind == "linear":
        arguments = linear_arguments(torch.float64, gamma, **fields)
        product, out = F.linear, ops.fixed_point_linear(*arguments)[0]
    else:
        arguments = conv_arguments(torch.float64, spatial=int(kind[4]), gamma=gamma, **fields)
        stride, padding, dilation, groups = arguments[11:]
        moves = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
        product = functools.partial(getattr(F, kind), **moves)
        out = ops.fixed_point_conv(*arguments)[0]
    x, weight, bias = arguments[:3]
    expected = meaning(product, x, weight, bias, torch.tensor(gamma), torch.tensor(0), FixedPointFormat(**fields))
    assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weight, bias), gradient)
    want = torch.autograd.grad(expected, (x, weight, bias), gradient)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@each_op
def test_evaluation_rounds_to_the_running_range_and_moves_nothing(kind):
    op, arguments = OPS[kind]
    given_ = arguments()
    given_[9] = False
    given_[3] = torch.tensor(1.25)
    before = [t.clone() for t in given_[3:6]]
    out, codes, _, _, scales = op(*given_)
    assert float(scales[0]) == 1.25 and float(scales[2]) == pytest.approx(1.25 / 7)
    assert torch.equal(codes, (given_[0].detach() / scales[2]).round().clamp(-7, 7).to(torch.int8))
    out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(given_[3:6], before, strict=True))
    assert given_[0].grad is not None


@each_op
def test_state_moves_once_for_every_gradient_and_not_in_the_forward_pass(kind):
    op, arguments = OPS[kind]
    given_ = arguments(gamma=0.5)
    outs = [op(*given_)[0] for _ in range(3)]
    assert float(given_[4]) == 0.5 and int(given_[5]) == 0 and float(given_[3]) == 0
    for number, out in enumerate(outs, 1):  # a module that is called three times: the later calls moved its state
        out.square().sum().backward()
        assert int(given_[5]) == number and float(given_[3]) > 0
    assert abs(float(given_[4]) - 0.5) <= 3e-3 + 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@each_op
def test_a_gradient_that_is_not_finite_shows_and_moves_no_interval(kind, bad):
    op, arguments = OPS[kind]
    given_ = arguments(gamma=0.5)
    out = op(*given_)[0]
    gradient = torch.randn_like(out)
    gradient.view(-1)[3] = bad
    grads = torch.autograd.grad(out, given_[:3], gradient)
    assert all(not bool(torch.isfinite(g).all()) for g in grads)
    assert float(given_[4]) == 0.5 and float(given_[3]) == 0


@each_op
def test_nan_of_an_input_shows_in_the_output(kind):
    op, arguments = OPS[kind]
    for training in (True, False):
        given_ = arguments()
        given_[9], given_[3] = training, torch.tensor(2.0)
        with torch.no_grad():
            given_[0].view(-1)[0] = math.nan
        assert bool(op(*given_)[0].isnan().any())


@given(st.integers(-20, 20), st.sampled_from(["linear", "conv"]))
def test_a_loss_scaled_by_a_power_of_two_scales_gradients(power, kind):
    op, arguments = OPS[kind]
    found = []
    for factor in (1.0, 2.0**power):
        torch.manual_seed(0)
        given_ = arguments(gamma=0.3)
        found.append(torch.autograd.grad(op(*given_)[0].square().sum() * factor, given_[:3]))
    assert all(torch.equal(a * 2.0**power, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_the_output_can_be_written_to(kind):
    """As an activation in place does, or `y += shortcut`; one-dimensional convolutions are views inside PyTorch."""
    arguments = linear_arguments() if kind == "linear" else conv_arguments(spatial=int(kind[4]))
    op = ops.fixed_point_linear if kind == "linear" else ops.fixed_point_conv
    out = op(*arguments)[0]
    out += 1
    out.relu_().sum().backward()
    assert arguments[1].grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@each_op
def test_dtypes(kind, dtype):
    op, arguments = OPS[kind]
    given_ = arguments(dtype)
    out = op(*given_)[0]
    assert out.dtype == dtype
    out.sum().backward()
    assert [t.grad.dtype for t in given_[:3]] == [dtype] * 3


def test_learned_clips_get_gradients():
    """The finite difference of the straight-through meaning is not the gradient; autograd of the meaning is."""
    x, weight, _, *_, act_clip, weight_clip, text, _, _ = arguments = linear_arguments(
        torch.float64, ranges="learned", rounding="nearest", gradient_bits=8, bias=False
    )

    def through(values, clip):
        scaled = (values / clip).clamp(-1, 1) * 7
        return (scaled + (scaled.round() - scaled).detach()) / 7 * clip

    clips = [c.detach().double().requires_grad_() for c in (act_clip, weight_clip)]
    out = ops.fixed_point_linear(*arguments)[0]
    want_out = F.linear(through(x, clips[0]), through(weight, clips[1]))
    assert torch.allclose(out, want_out, rtol=1e-6, atol=1e-6)
    gradient = torch.randint(-127, 128, out.shape).double()  # codes of 8 bits: nothing is rounded
    gradient.view(-1)[0] = 127
    arguments[4].fill_(1.0)  # gamma
    got = torch.autograd.grad(out, (x, weight, act_clip, weight_clip), gradient)
    want = torch.autograd.grad(want_out, (x, weight, *clips), gradient)
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)


def test_the_range_of_a_batch_stands_in_while_there_is_none():
    given_ = linear_arguments()
    given_[9] = False
    assert float(ops.fixed_point_linear(*given_)[4][0]) > 1
    assert all(not t.any() for t in state())
