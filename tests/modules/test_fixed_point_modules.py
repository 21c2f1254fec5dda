"""Modules that train in fixed point: the parameters stay, evaluation is what is settled, state keeps its dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompile.modules.fixed_point_modules import FixedPointConv, FixedPointLinear, FixedPointStart
from qcompile.numerics.code_convolution import ConvolutionShape
from qcompile.numerics.fixed_point_format import FixedPointFormat

SHAPE = ConvolutionShape((2,), (1,), (1,), 2)


def start(act_range=0.0, transposed=False, **fields):
    return FixedPointStart(FixedPointFormat(**fields), torch.tensor(act_range), transposed)


def make(kind, **fields):
    """A module and an input."""
    if kind == "conv":
        old = nn.Conv1d(4, 6, 3, 2, 1, groups=2)
        return FixedPointConv(old.weight, old.bias, start(**fields), SHAPE), torch.randn(8, 4, 9)
    old = nn.Linear(10, 6)
    return FixedPointLinear(old.weight, old.bias, start(**fields)), torch.randn(8, 10)


def train(module, x, steps=3):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


@given(
    st.sampled_from(["linear", "conv"]), st.integers(2, 8), st.integers(2, 8), st.booleans(),
    st.sampled_from(["sigma", "max", "learned"]), st.integers(0, 99),
)  # fmt: skip
def test_evaluation_is_what_is_settled_bit_for_bit(kind, weight_bits, act_bits, signed, ranges, seed):
    torch.manual_seed(seed)
    fields = dict(weight_bits=weight_bits, act_bits=act_bits, signed=signed, ranges=ranges)
    module, x = make(kind, act_range=2.0, **fields)
    train(module, x if signed else x.abs())
    module.eval()
    settled = module.settled()
    for batch in (x, torch.randn_like(x) * 5):
        assert torch.equal(module(batch), settled(batch))
    assert not list(settled.parameters())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_evaluation_moves_nothing(kind):
    module, x = make(kind)
    train(module, x)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.eval()
    module(x).sum().backward()
    module.train()
    with torch.no_grad():
        module(x * 100)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_without_a_range_it_cannot_be_settled(kind):
    module, x = make(kind)
    with pytest.raises(ValueError, match="has not trained yet. Fix"):
        module.settled()
    train(module, x, 1)
    module.settled()
    with torch.no_grad():
        module.weight[0] = torch.nan
    with pytest.raises(ValueError, match="weight is not finite"):
        module.settled()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_state_keeps_its_dtype(dtype):
    module, x = make("linear")
    module.to(dtype)
    assert module.weight.dtype == dtype
    assert (module.act_range.dtype, module.gamma.dtype, module.counter.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    train(module, x.to(dtype), 1)
    assert int(module.counter) == 1 and float(module.act_range) > 0
    assert module.eval().settled()(x.to(dtype)).dtype == dtype


def test_a_transposed_parameter_stays_one():
    old = nn.Parameter(torch.randn(10, 6))
    module = FixedPointLinear(old, None, start(transposed=True))
    plain = FixedPointLinear(nn.Parameter(old.detach().t().contiguous()), None, start())
    x = torch.randn(8, 10)
    assert module.weight is old and torch.equal(module(x), plain(x))
    for part in (module, plain):
        part(x).square().mean().backward()
    assert torch.equal(module.weight.grad, plain.weight.grad.t())
    assert torch.equal(module.eval().settled()(x), plain.eval().settled()(x))


def test_the_running_range_follows_the_batches():
    module, x = make("linear")
    train(module, x, 1)
    first = float(module.act_range)
    assert first == pytest.approx(3 * float(x.std(correction=0)), rel=1e-5)
    train(module, x * 2, 1)
    assert float(module.act_range) == pytest.approx(first * 1.1, rel=1e-5)


def test_learned_clips_are_trained():
    module, x = make("linear", ranges="learned", act_range=2.0)
    before = module.act_clip.detach().clone(), module.weight_clip.detach().clone()
    train(module, x)
    assert not torch.equal(module.act_clip, before[0]) and not torch.equal(module.weight_clip, before[1])


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_it_is_near_the_float_product(kind):
    module, x = make(kind, weight_bits=8, act_bits=8, ranges="max")
    with torch.no_grad():
        parts = x, module.weight, module.bias
        expected = F.linear(*parts) if kind == "linear" else F.conv1d(*parts, 2, 1, 1, 2)
        assert float((module(x) - expected).norm() / expected.norm()) < 0.02
    assert str(module.format) in repr(module)


def test_sizes_have_their_usual_names():
    old = nn.Conv2d(4, 6, (3, 5), (1, 2), (1, 0), (2, 1), groups=2)
    shape = ConvolutionShape(old.stride, old.padding, old.dilation, old.groups)
    module = FixedPointConv(old.weight, old.bias, start(act_range=1.0), shape)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(module, name) == getattr(module.settled(), name) == getattr(old, name)
    linear, _ = make("linear")
    assert (linear.in_features, linear.out_features) == (10, 6)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_rows(kind):
    module, x = make(kind)
    empty = x[:0].requires_grad_()
    module(empty).sum().backward()
    assert empty.grad.shape == empty.shape and not module.weight.grad.any() and float(module.gamma) == 0


def test_strides_of_the_input_do_not_show():
    old = nn.Conv2d(4, 6, 3, bias=False)
    module = FixedPointConv(old.weight, None, start(act_range=1.0), ConvolutionShape((1, 1), (0, 0), (1, 1), 1)).eval()
    x = torch.randn(2, 4, 8, 8)
    for call in (module, module.settled()):
        outs = [call(x), call(x.to(memory_format=torch.channels_last))]
        assert torch.equal(*outs) and outs[0].stride() == outs[1].stride()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_empty_batch_moves_no_state(kind):
    module, x = make(kind)
    module(x).sum().backward()
    before = {name: tensor.clone() for name, tensor in module.named_buffers()}
    module(x[:0].requires_grad_()).sum().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.named_buffers())


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_learned_clips_of_zeros_can_grow(kind):
    module, x = make(kind, ranges="learned")
    with torch.no_grad():
        module.weight.zero_()
    again = type(module)(module.weight, module.bias, start(ranges="learned"), *([SHAPE] if kind == "conv" else []))
    again(x).square().sum().backward()
    for clip in (again.weight_clip, again.act_clip):
        assert clip > 0 and torch.isfinite(clip.grad)
