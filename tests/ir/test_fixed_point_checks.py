"""Wrong arguments of the fixed-point operators end in an error with the argument and its value, real and fake alike."""

from __future__ import annotations

import pytest
import torch
from fixed_point_cases import conv_arguments, linear_arguments
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.ir.fixed_point_checks import check_sign
from qcompile.numerics.fixed_point_format import FixedPointFormat

ops = torch.ops.qcompile


def refused(op, arguments):
    """The message of an operator, which must be the same on fake tensors."""
    with pytest.raises(ValueError, match=str(op).replace("qcompile.", "qcompile::")) as error:
        op(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(ValueError) as other:
            op(*fakes)
    assert str(other.value) == str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "place,value,said",
    [
        (0, torch.zeros(2, 15), "x is float32 [2, 15]"), (0, torch.zeros(2, 16, dtype=torch.int8), "x is int8"),
        (1, torch.zeros(8), "weight is float32 [8]"), (2, torch.zeros(7), "bias is float32 [7]"),
        (3, torch.zeros((), dtype=torch.float64), "act_range is float64"), (4, torch.zeros(2), "gamma is float32 [2]"),
        (5, torch.zeros(()), "counter is float32"), (6, torch.ones(()), "act_clip is float32"),
        (8, "int4", "'int4' is no fixed-point format"), (10, torch.int32, "dtype is torch.int32"),
    ],
)  # fmt: skip
def test_linear(place, value, said):
    arguments = linear_arguments()
    arguments[place] = value
    assert said in refused(ops.fixed_point_linear, arguments)


@pytest.mark.parametrize(
    "place,value,said",
    [
        (0, torch.zeros(3, 5, 7, 7), "x is float32 [3, 5, 7, 7]"), (1, torch.zeros(8, 2), "weight is float32 [8, 2]"),
        (11, [1], "stride is [1]"), (11, [0, 1], "stride is [0, 1]"), (12, [-1, 0], "padding is [-1, 0]"),
        (13, [1, 0], "dilation is [1, 0]"), (2, torch.zeros(2), "bias is float32 [2]"),
    ],
)  # fmt: skip
def test_conv(place, value, said):
    arguments = conv_arguments()
    arguments[place] = value
    assert said in refused(ops.fixed_point_conv, arguments)


def test_groups_divide_the_channels():
    arguments = conv_arguments()
    arguments[0], arguments[14] = torch.zeros(3, 6, 7, 7), 3
    assert "groups is 3" in refused(ops.fixed_point_conv, arguments)


def test_learned_ranges_need_their_clips():
    arguments = linear_arguments(ranges="learned")
    arguments[7] = None
    assert "weight_clip is None" in refused(ops.fixed_point_linear, arguments)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_values_below_zero_without_a_sign(kind):
    """Refused while a site trains, in the first batch that has one; taken for zero in evaluation."""
    op, arguments = {
        "linear": (ops.fixed_point_linear, linear_arguments(signed=False, site="deep.weight")),
        "conv": (ops.fixed_point_conv, conv_arguments(signed=False, site="deep.weight")),
    }[kind]
    op(*arguments)
    arguments[0] = arguments[0].detach().clone()
    arguments[0].view(-1)[5] = -0.25
    message = rf"fixed_point_{kind}: deep.weight reads -0.25 in training; .*Fix: FixedPoint\(drop_signs=False\)"
    with pytest.raises(ValueError, match=message):
        op(*arguments)
    evaluation = [*arguments[:9], False, *arguments[10:]]
    op(*evaluation)
    op(arguments[0][:0], *arguments[1:])


def test_nan_and_negative_zero_are_not_below_zero():
    for value in (float("nan"), -0.0, float("inf")):
        check_sign("op", torch.tensor([1.0, value]), FixedPointFormat(signed=False))
    check_sign("op", torch.tensor([-1.0]), FixedPointFormat())
    with pytest.raises(ValueError, match="op: a site reads -1 in training"):
        check_sign("op", torch.tensor([-1.0]), FixedPointFormat(signed=False))


class OnDevice:
    """What is asked of a tensor on a GPU: its least value, which nothing waits for."""

    is_cuda = True

    def __init__(self, least):
        self.least = torch.tensor(least)

    def numel(self):
        return 1

    def amin(self):
        return self.least


def test_on_a_gpu_the_device_asserts():
    form = FixedPointFormat(signed=False, site="deep.weight")
    check_sign("op", OnDevice(0.0), form)
    with pytest.raises(RuntimeError, match="op: deep.weight reads values below zero in training; .*drop_signs"):
        check_sign("op", OnDevice(-1.0), form)
