"""Products with a weight that are no sites are named, once each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.analysis.other_products import other_products
from qcompile.analysis.sites import find_sites
from qcompile.ir.capture import capture
from qcompile.numerics.format import Format
from qcompile.numerics.rounding import quantize_tensor


class Left(nn.Module):
    """The weight stands on the left."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x):
        return self.weight @ x.transpose(-1, -2)


class Computed(nn.Module):
    """The weight is a product of parameters."""

    def __init__(self):
        super().__init__()
        self.direction, self.size = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(6, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.direction * self.size)


class Twice(nn.Module):
    """One convolution, called twice, and products without a weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(self.conv(x))
        return y @ y.transpose(-1, -2)


CASES = {
    "conv1d": (lambda: nn.Conv1d(8, 4, 3), (2, 8, 9), "weight", "a convolution"),
    "conv2d": (lambda: nn.Conv2d(3, 4, 2, padding="same"), (2, 3, 6, 6), "weight", "a convolution"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 6, 6), "weight", "a convolution"),
    "twice": (Twice, (2, 8, 9), "conv.weight", "a convolution"),
    "left": (Left, (2, 5, 8), "weight", "stands on the left"),
    "computed": (Computed, (2, 5, 8), "direction", "is computed from parameters"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_product_that_is_no_site(name):
    make, shape, weight, reason = CASES[name]
    program = capture(make().requires_grad_(False), (torch.randn(shape),))
    (found,) = other_products(program, {site.node for site in find_sites(program)})
    assert found.name == weight and reason in found.reason


def test_recurrent_layers():
    program = capture(nn.LSTM(8, 8, batch_first=True).requires_grad_(False), (torch.randn(2, 5, 8),), dynamic=False)
    (found,) = other_products(program, set())
    assert found.name.startswith("weight_") and "recurrent" in found.reason


def test_sites_and_products_of_weights_alone_are_not_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.a, self.b = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.eye(8))

        def forward(self, x):
            return self.linear(x) + (self.a @ self.b).sum()

    program = capture(Model().requires_grad_(False), (torch.randn(3, 8),))
    assert not other_products(program, {site.node for site in find_sites(program)})


def test_the_report_counts_them():
    model = nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)).requires_grad_(False)
    report = qcompile.quantize(model, "int8", example=torch.randn(2, 8, 9), progress=False)
    assert {site.name: site.quantized for site in report.sites} == {"0.weight": False, "3.weight": True}
    assert "1 of 2 sites quantized" in str(report) and "a convolution, which no recipe quantizes (0.weight)" in str(
        report
    )


def named(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

        def forward(self, x):
            return function(self, x)

    program = capture(Model().requires_grad_(False), (torch.randn(2, 3, 8),), dynamic=False)
    return [found.name for found in other_products(program, {site.node for site in find_sites(program)})]


def test_a_product_with_a_vector_is_not_named():
    assert named(lambda m, x: x @ m.vector) == []
    assert named(lambda m, x: x @ (m.matrix * m.vector)) == ["matrix"]


def test_an_activation_that_met_a_weight_is_an_activation():
    assert named(lambda m, x: (x * m.matrix[0]) @ x.mT) == []


def test_a_product_of_computed_weights_alone_is_not_named():
    assert named(lambda m, x: x * ((m.matrix * 2) @ (m.matrix * 3)).sum()) == []


def test_a_quantized_weight_is_no_other_product():
    class Dequantized(nn.Module):
        def __init__(self):
            super().__init__()
            parts = quantize_tensor(torch.randn(8, 32), Format.parse("int8/row")).stored_parts
            self.codes, self.scale = (nn.Buffer(part) for part in parts[:2])

        def forward(self, x):
            weight = torch.ops.qcompile.dequantize(self.codes, self.scale, None, None, "int8/row", 32, torch.float32)
            return nn.functional.linear(x, weight)

    assert not other_products(capture(Dequantized(), (torch.randn(2, 32),)), set())
