"""Tied weights are named, with what they are tied to, and the fix."""

from __future__ import annotations

import pytest
import torch
from laws import shape
from torch import nn

from qcompile.analysis.residual_stream import residual_streams
from qcompile.analysis.sites import find_sites
from qcompile.analysis.tied_weights import tied_obstacle, tied_table_obstacle
from qcompile.ir.capture import capture
from qcompile.testing import Decoder


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_weight_and_its_table_are_obstacles(tied):
    model = Decoder(shape(tied=tied))
    program = capture(model, (model.example(),))
    sites = find_sites(program)
    *others, logits = sites
    assert tied_obstacle(others) is None and tied_obstacle([]) is None
    (stream,) = residual_streams(program)
    assert stream.flow_obstacle is None and len({site.name for site in stream.consumers}) == len(stream.consumers)
    obstacles = tied_obstacle(sites), tied_table_obstacle(program, stream.tables, sites)
    if not tied:
        assert obstacles == (None, None)
        return
    assert logits.name in obstacles[0].reason and obstacles[0].node == logits.node.name
    assert logits.name in obstacles[1].reason and obstacles[1].node == logits.weight.name
    assert all("Fix: Untie() before this pass" in obstacle.reason for obstacle in obstacles)


def test_a_shared_bias_is_an_obstacle():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.a(x) * self.b(x)

    sites = find_sites(capture(Gated(), (torch.randn(3, 8),)))
    obstacle = tied_obstacle(sites)
    assert obstacle is not None and obstacle.reason == f"the bias of a.weight is tied to {sites[1].node.name}"
