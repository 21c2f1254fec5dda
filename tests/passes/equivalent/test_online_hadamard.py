"""OnlineHadamard's law: a transform before a product, its inverse in the weight."""

from __future__ import annotations

import torch
from laws import before_and_after, rewrite, shape
from torch import nn

from qcompile.ir.capture import capture
from qcompile.ir.op_calls import HadamardCall
from qcompile.passes import FoldNorm, OnlineHadamard, Rotate
from qcompile.passes.equivalent.online_hadamard import online_hadamard
from qcompile.recipe.pass_context import PassContext
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


class PostNorm(nn.Module):
    """What a norm gives is read by linears, by a router and by the residual sum."""

    def __init__(self):
        super().__init__()
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.gate, self.router = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 4)
        self.down = nn.Linear(8, 16)
        self.double().requires_grad_(False)

    def forward(self, x):
        y = self.norm(x)
        chosen = self.router(y).topk(1).values
        return self.last(y + self.down(self.up(y) * self.gate(y)) * chosen)


def test_norms_of_streams_without_a_rotation_are_transformed_at_their_sites():
    model, x = PostNorm(), torch.randn(2, 3, 16, dtype=torch.float64)
    before = capture(model, (x,))
    after = before.copy()
    (report,) = rewrite(after, OnlineHadamard(), batches=[[x]])
    assert report.done == ["down.weight"]
    after = before.copy()
    (report,) = rewrite(after, OnlineHadamard(norms=True), batches=[[x]])
    assert_equivalent(before, after, [x])
    assert report.done == ["up.weight", "down.weight"]
    changed = {name for name, tensor in after.weights.items() if before.weights.get(name) is not tensor}
    assert changed == {"up.weight", "gate.weight", "down.weight", "hadamard16.signs", "hadamard8.signs"}
    assert len(list(HadamardCall.find(after))) == 2  # one for up and gate


def test_norms_of_rotated_streams_are_not_transformed():
    model = Decoder(shape())
    _, after, ids, (*_, report) = before_and_after(model, FoldNorm(), Rotate(), OnlineHadamard(norms=True))
    assert report.done == ["blocks.0.down.weight", "blocks.1.down.weight"]
    before, after, ids, (*_, report) = before_and_after(model, OnlineHadamard(norms=True))
    assert_equivalent(before, after, [ids])
    assert len(report.done) > 2


def test_sites_that_stay_float_are_not_transformed():
    model = Decoder(shape())
    program = capture(model, (model.example(),))
    context = PassContext.of(program, keep_float={"blocks.0.down.weight": "no module"})
    report = online_hadamard(program, OnlineHadamard(), context)
    assert report.done == ["blocks.1.down.weight"] and "stays float" in report.skipped[0].reason
