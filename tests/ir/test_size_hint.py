"""Sizes of the example, and sizes that depend on data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.ir.capture import capture
from qcompile.ir.size_hint import hint


def test_a_size_is_that_of_the_example():
    (out,) = capture(nn.Linear(8, 4), (torch.randn(20, 8),)).outputs
    assert [hint(size) for size in out.meta["val"].shape] == [20, 4]


class Chosen(nn.Module):
    """Multiplies the rows that a mask chooses: how many depends on data."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, mask):
        hidden = self.up(x)
        return hidden.masked_scatter(mask[:, None], self.down(hidden[mask]))


@pytest.mark.parametrize("recipe", ["int8", "int8-rotated"])
def test_a_size_that_depends_on_data_has_no_hint(recipe):
    model, x, mask = Chosen().eval(), torch.randn(6, 64), torch.tensor([True, False, True, True, False, False])
    with torch.no_grad():
        want = model(x, mask)
        report = qcompile.quantize(model, recipe, [(x, mask)], progress=False)
        assert [site.quantized for site in report.sites] == [True, True]
        assert float((model(x, mask) - want).norm() / want.norm()) < 0.03
