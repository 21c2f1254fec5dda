"""OnlineHadamard's law: a transform before a product, its inverse in the weight."""

from __future__ import annotations

import torch
from laws import before_and_after, rewrite, shape
from torch import nn

from qcompile.ir.capture import capture
from qcompile.ir.op_calls import HadamardCall
from qcompile.passes import OnlineHadamard
from qcompile.testing import Decoder, assert_equivalent


def test_the_output_stays_and_only_gated_inputs_are_transformed():
    before, after, ids, (report,) = before_and_after(Decoder(shape()), OnlineHadamard())
    assert_equivalent(before, after, [ids])
    assert report.done == ["blocks.0.down.weight", "blocks.1.down.weight"]
    assert report.notes == ["online Hadamard 12*2 for 24 channels"]
    assert len(list(HadamardCall.find(after))) == 2
    down = "blocks.0.down.weight"
    assert torch.allclose(after.weights[down].norm(), before.weights[down].norm())
    assert not torch.allclose(after.weights[down], before.weights[down])


def test_a_size_without_a_hadamard_matrix_is_skipped():
    model = nn.Sequential(nn.Linear(8, 22), nn.ReLU(), nn.Linear(22, 8)).requires_grad_(False)
    x = torch.randn(3, 8)
    program = capture(model, (x,))
    (report,) = rewrite(program, OnlineHadamard(), batches=[[x]])
    assert not report.done and [place.reason for place in report.skipped] == ["no Hadamard matrix of 22 is known"]


def test_a_value_that_is_read_by_more_than_linears_is_skipped():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            y = torch.relu(self.first(x))
            return y + self.second(y)

    x = torch.randn(3, 16)
    program = capture(Residual().requires_grad_(False), (x,))
    (report,) = rewrite(program, OnlineHadamard(), batches=[[x]])
    assert not report.done and report.skipped[0].site == "second.weight" and report.skipped[0].node
