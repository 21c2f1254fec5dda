"""The Triton kernels that round in training give the bits that the definitions in PyTorch give on a CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE

from qcompile.codegen.triton.kernels.training_spec import ChangeCodes
from qcompile.codegen.triton.launch.round_codes import change_codes, change_launch, round_gradient, round_values
from qcompile.numerics import code_rounding
from qcompile.numerics.code_update import add_to_codes
from qcompile.numerics.counter_random import uniform
from qcompile.numerics.format import Format
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.rounding import quantize_tensor

# What numpy, which the interpreter computes with, says of values that are not finite.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

BLOCK = 1024  # of the table of launches
SIZES = st.one_of(st.integers(0, 200), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 70_001]))
STREAMS = st.one_of(st.none(), st.integers(-(2**31), 2**31 - 1))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def definitions(monkeypatch):
    monkeypatch.setattr(code_rounding, "_installed", {})


def stream_of(value):
    return None if value is None else torch.tensor(value, dtype=torch.int32)


def there(*tensors):
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def same(got, want):
    return all(torch.equal(a.cpu(), b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


def awkward(n, seed, step=0.25):
    """Values of many sizes; multiples of the step and halves of them, zeros of both signs and what is not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 6)
    x[::5] = torch.randint(-19, 20, x[::5].shape, generator=generator) * (step / 2)
    if seed % 2:
        odd = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
        where = torch.randint(0, max(n, 1), (9,), generator=generator)
        x[where[: 9 * bool(n)]] = odd[: 9 * bool(n)]
    return x


@given(SIZES, st.integers(0, 99), st.sampled_from([1, 7, 127]), STREAMS)
def test_gradients(n, seed, levels, stream):
    x, step, draw = awkward(n, seed), torch.tensor(0.25), stream_of(stream)
    got = round_gradient(*there(x, step, step * levels), levels, *there(draw))
    assert same(got, code_rounding.gradient_codes(x, step, step * levels, levels, draw))


@given(SIZES, st.integers(0, 99), st.sampled_from([(-7, 7), (0, 15), (-127, 127)]))
def test_values(n, seed, bounds):
    x, step = awkward(n, seed), torch.tensor(0.3)
    assert same(round_values(*there(x, step), *bounds), code_rounding.value_codes(x, step, *bounds))


@pytest.mark.parametrize("step", [NAN, INF, 0.0, 1e-40])
def test_steps_that_are_no_steps(step):
    x, step, draw = awkward(BLOCK + 9, 1), torch.tensor(step), stream_of(9)
    assert same(round_values(*there(x, step), -7, 7), code_rounding.value_codes(x, step, -7, 7))
    for stream in (None, draw):
        got = round_gradient(*there(x, step, 7 * step), 7, *there(stream))
        assert same(got, code_rounding.gradient_codes(x, step, 7 * step, 7, stream))


def test_a_nan_is_told_wherever_it_stands():
    for place in (None, 0, BLOCK - 1, BLOCK, 2 * BLOCK):
        x = torch.zeros(2 * BLOCK + 1)
        if place is not None:
            x[place] = NAN
        codes, lost = round_values(*there(x, torch.tensor(1.0)), -7, 7)
        assert bool(lost) == (place is not None) and not codes.any()


def test_what_stands_behind_the_last_value_is_none():
    x, zero, one = torch.ones(5), torch.tensor(0.0), torch.tensor(1.0)
    codes, lost = round_values(*there(x, zero), -7, 7)
    assert codes.tolist() == [7] * 5 and not bool(lost)
    assert int(round_gradient(*there(x, one, -one), 7, None)[1]) == 5


def test_an_integer_stays_where_the_noise_is_zero():
    """As it is for the first value of stream 0."""
    x, one, draw = torch.tensor([3.0, -3.0, 0.5]), torch.tensor(1.0), stream_of(0)
    assert float(uniform((1,), draw, device=x.device)) == 0
    assert round_gradient(*there(x, one, 7 * one), 7, *there(draw))[0].tolist()[:2] == [3, -3]


def test_draws_are_those_of_the_stream_beyond_the_first_block():
    x, one, draw = torch.full((3 * BLOCK,), 0.5), torch.tensor(1.0), stream_of(-(2**31))
    codes, beyond = round_gradient(*there(x, one, 7 * one), 7, *there(draw))
    assert torch.equal(codes.cpu() == 1, uniform(tuple(x.shape), draw, device=x.device) < 0.5) and int(beyond) == 0


@given(
    st.integers(1, 6), st.integers(1, 600), st.sampled_from([1, 96, 256, 2048]), st.integers(0, 99),
    st.sampled_from([0.0, 0.01]), STREAMS,
)  # fmt: skip
def test_changes(n, k, group, seed, decay, stream):
    form = Format.parse(f"int8/group{min(group, k)}/zero")
    weight = quantize_tensor(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), form)
    change = awkward(n * k, 2 * seed).view(n, k) * 1e-2  # of an even seed, which gives finite values
    change[0] = 0
    change[:, : form.group] *= -1
    draw = stream_of(stream)
    noise = None if draw is None else uniform((n, k), draw, device=change.device)
    want = add_to_codes(weight, change, decay, noise)
    old = there(weight.codes, weight.scale, weight.zero, change)
    *got, bad = change_codes(*old, form.group, decay, *there(draw))
    assert same(got, want.parts[:3]) and not bool(bad)


@pytest.mark.parametrize("stream", [None, 5])
def test_a_group_in_which_nothing_changes_keeps_what_it_has(stream):
    """Also where its scale and zero point are not those of its range."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(100, 120, (3, 20), generator=generator, dtype=torch.uint8)
    scale, zero = torch.full((3, 3), 0.1), torch.full((3, 3), 90, dtype=torch.uint8)
    weight = QTensor(codes, scale, zero, None, Format.parse("int8/group8/zero"))
    change, draw = torch.zeros(3, 20), stream_of(stream)
    change[1, 9] = 1e-3
    *got, _ = change_codes(*there(codes, scale, zero, change), 8, 0.0, *there(draw))
    noise = None if draw is None else uniform((3, 20), draw, device=change.device)
    assert same(got, add_to_codes(weight, change, 0.0, noise).parts[:3])
    unchanged = torch.ones(3, 3, dtype=torch.bool)
    unchanged[1, 1] = False
    assert torch.equal(got[1].cpu() == scale, unchanged) and torch.equal(got[2].cpu() == zero, unchanged)


def test_a_group_of_zeros_and_one_that_becomes_zeros():
    form = Format.parse("int8/group4/zero")
    weight = quantize_tensor(torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, -1.0, -2.0]]), form)
    change = -weight.dequantize()
    change[0, 1] = 1e-36
    old = there(weight.codes, weight.scale, weight.zero, change)
    *got, bad = change_codes(*old, 4, 0.0, None)
    want = add_to_codes(weight, change)
    assert same(got, want.parts[:3]) and not bool(bad) and got[1].tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("value,other", [(NAN, 0.0), (INF, 0.0), (-INF, 0.0), (3e38, -3e38)])
@pytest.mark.parametrize("place", [0, 299])
def test_a_group_that_no_code_holds_is_told(value, other, place):
    weight = quantize_tensor(torch.randn(2, 300), Format.parse("int8/group256/zero"))
    change = torch.zeros(2, 300)
    change[1, place], change[1, place - 1 if place else 1] = value, other
    for stream in (None, stream_of(3)):
        old = there(weight.codes, weight.scale, weight.zero, change)
        assert bool(change_codes(*old, 256, 0.0, *there(stream))[3])


def test_a_longer_group_has_a_program_of_its_own_and_more_warps():
    launches = [change_launch(ChangeCodes(group=group)) for group in (32, 256, 1024, 4096, 8192)]
    assert [(launch.block_m, launch.num_warps) for launch in launches] == [(32, 4), (4, 4), (1, 4), (1, 8), (1, 16)]
