"""OnlineHadamard's law: a transform before a product, its inverse in the weight."""

from __future__ import annotations

import pytest
import torch
from laws import assert_rounded_once, before_and_after, rewrite, rewritten, shape
from torch import nn

import qcompile
from qcompile.ir.capture import capture
from qcompile.ir.op_calls import HadamardCall
from qcompile.passes import FoldNorm, OnlineHadamard, Rotate
from qcompile.passes.equivalent.online_hadamard import online_hadamard
from qcompile.recipe.pass_context import PassContext
from qcompile.recipe.recipe import Recipe
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


class Gated(nn.Module):
    """Linears that read what `function` makes of an activation."""

    def __init__(self, function):
        super().__init__()
        self.up, self.a, self.b, self.function = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), function
        self.stack = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return self.function(self, x)


X = torch.randn(2, 3, 8, dtype=torch.float64)


def test_a_transform_stands_right_before_its_site():
    """Behind casts, layouts and pieces of the value: a module that takes the site's place can hold it."""

    def function(m, x):
        y = torch.relu(m.up(x))
        return m.a(y.float().double()), m.b(y[:, :2].flatten(0, 1))

    model = Gated(function)
    _, after, (report,) = rewritten(model, OnlineHadamard(), x=X)
    assert len(report.done) == 1 and len(list(HadamardCall.find(after))) == 2
    want = model(X)
    qcompile.quantize(model, Recipe("online", (OnlineHadamard(),)), [X], progress=False)
    assert all(torch.allclose(found, exact) for found, exact in zip(model(X), want, strict=True))


KEPT = {
    "a weight that is used twice": (lambda m, x: m.a(torch.relu(m.a(x))), "is tied to"),
    "a value that experts read": (lambda m, x: (m.a(y := torch.relu(m.up(x))), y @ m.stack), "is not a site"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_a_transform_would_change_is_named(name):
    function, reason = KEPT[name]
    *_, (report,) = rewritten(Gated(function), OnlineHadamard(), x=X)
    assert not report.done and any(reason in place.reason for place in report.skipped), report.skipped


@pytest.mark.parametrize("function", [lambda m, x: m.a(m.up(x)), lambda m, x: m.a(x + m.up(x)), lambda m, x: m.a(x)])
def test_what_is_no_product_and_no_activation_is_left_alone(function):
    *_, (report,) = rewritten(Gated(function), OnlineHadamard(), x=X)
    assert not report.done and not report.skipped


def test_a_value_that_is_written_to_is_not_transformed():
    """A transform behind the norm would miss what is written later."""

    class Written(Gated):
        def __init__(self):
            super().__init__(None)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            y = self.norm(x)
            y[:, 0] = 5.0
            return self.a(y), y * 2

    before = capture(Written().double().requires_grad_(False), (X,), dynamic=False)
    after = before.copy()
    (report,) = rewrite(after, OnlineHadamard(norms=True), batches=[[X]])
    assert_equivalent(before, after, [X])
    assert not report.done and "an operator in place writes to the value" in report.skipped[0].reason


def test_values_of_one_size_share_their_signs_and_seeds_differ():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    _, after, (report,) = rewritten(model, OnlineHadamard(), x=X)
    assert report.done == ["2.weight", "4.weight"] and len(report.notes) == 1
    assert len({call.signs for _, call in HadamardCall.find(after)}) == 1
    _, other, _ = rewritten(model, OnlineHadamard(seed=1), x=X)
    assert not torch.equal(other.weights["hadamard8.signs"], after.weights["hadamard8.signs"])


def test_weights_are_rounded_once():
    assert_rounded_once(Decoder(shape(layers=1)), OnlineHadamard())


def test_the_product_with_a_gain_is_no_gate():
    model = Decoder(shape(layers=1))
    *_, (report,) = rewritten(model, OnlineHadamard(), x=model.example())
    assert report.done == ["blocks.0.down.weight"]


class Routed(Gated):
    """A linear that chooses experts, beside others that read the same activation."""

    def __init__(self, function):
        super().__init__(function)
        self.router = nn.Linear(8, 2)

    def route(self, y):
        weight, chosen = self.router(y).topk(1)
        return torch.where(chosen == 0, self.up(y), self.b(y)) * weight


def test_a_router_reads_the_value_as_it_is():
    def function(m, x):
        y = torch.relu(m.a(x))
        return m.router(y).topk(1).indices, m.up(y)

    before, after, (report,) = rewritten(Routed(function), OnlineHadamard(), x=X)
    assert report.done == ["up.weight"] and after.weights["router.weight"] is before.weights["router.weight"]
    assert not {n.name for n in after.graph.nodes if n.name in report.changed}

    def alone(m, x):
        return m.router(torch.relu(m.a(x))).topk(1).indices

    *_, (report,) = rewritten(Routed(alone), OnlineHadamard(), x=X)
    assert not report.done and not report.skipped


def test_every_way_from_a_norm_to_a_site_is_transformed():
    class Several(Gated):
        def __init__(self):
            super().__init__(None)
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            y = self.norm(x)
            return self.a(y.flatten(0, 1)), self.b(y), self.up(y), y.sin()

    _, after, (report,) = rewritten(Several(), OnlineHadamard(norms=True), x=X)
    assert len(report.done) == 1 and len(list(HadamardCall.find(after))) == 2
