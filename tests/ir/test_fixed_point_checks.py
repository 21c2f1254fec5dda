"""Wrong arguments of the fixed-point operators end in an error with the argument and its value, real and fake alike."""

from __future__ import annotations

import pytest
import torch
from fixed_point_cases import conv_arguments, linear_arguments
from torch._subclasses.fake_tensor import FakeTensorMode

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
