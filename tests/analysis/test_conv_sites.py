"""Convolution sites: found by arithmetic, with their sizes; what cannot train in codes is none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.analysis.conv_sites import find_conv_sites
from qcompile.ir.capture import capture


class Sized(nn.Module):
    """A convolution by torch.nn.functional with given arguments."""

    def __init__(self, weight, **arguments):
        super().__init__()
        self.weight, self.bias, self.arguments = nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight))), arguments

    def forward(self, x):
        return (F.conv1d if self.weight.ndim == 3 else F.conv2d)(x, self.weight, self.bias, **self.arguments)


def sites(model, *shape):
    return find_conv_sites(capture(model.eval(), (torch.randn(shape),)))


@pytest.mark.parametrize(
    "kernel,arguments,expected",
    [
        ((3, 3), {}, ((1, 1), (0, 0), (1, 1))), ((3,), {"stride": 2, "padding": 1}, ((2,), (1,), (1,))),
        ((3, 5), {"padding": "same"}, ((1, 1), (1, 2), (1, 1))),
        ((3, 3), {"padding": "valid"}, ((1, 1), (0, 0), (1, 1))),
        ((2, 3), {"padding": "same", "dilation": 2}, ((1, 1), (1, 2), (2, 2))),
        ((3, 3), {"stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)}, ((1, 2), (0, 2), (2, 1))),
    ],
)  # fmt: skip
def test_sizes(kernel, arguments, expected):
    model = Sized(torch.randn(6, 2, *kernel), groups=2, **arguments)
    (site,) = sites(model, 3, 4, *[9] * len(kernel))
    assert (site.stride, site.padding, site.dilation, site.groups) == (*expected, 2)
    assert site.name == "weight" and site.bias is not None
    x = torch.randn(3, 4, *[9] * len(kernel))
    assert torch.equal(torch.convolution(x, model.weight, model.bias, *expected, False, [0] * len(kernel), 2), model(x))


def test_without_bias():
    (site,) = sites(nn.Conv2d(2, 4, 3, bias=False), 2, 2, 8, 8)
    assert site.bias is None


class Computed(nn.Conv2d):
    """A convolution whose weight is computed."""

    def forward(self, x):
        return F.conv2d(x, self.weight.tanh(), self.bias)


@pytest.mark.parametrize(
    "model,shape",
    [
        (Sized(torch.randn(4, 2, 2), padding="same"), (2, 2, 9)),  # one zero on one side
        (nn.ConvTranspose2d(2, 4, 3), (2, 2, 8, 8)), (nn.Conv3d(2, 4, 3), (2, 2, 8, 8, 8)),
        (Computed(2, 4, 3), (2, 2, 8, 8)), (nn.Conv2d(2, 4, 3), (2, 8, 8)), (nn.Linear(4, 4), (2, 4)),
    ],
)  # fmt: skip
def test_no_site(model, shape):
    assert not sites(model, *shape)
