"""FoldNorm's law: gains, shifts and means of norms move into the linears around them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from laws import assert_rounded_once, before_and_after, rewrite, rewritten, shape
from torch import nn

from qcompile.analysis.norms import find_norms
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm, Rotate, Untie
from qcompile.testing import Decoder, assert_equivalent, decoders


@given(decoders())
@settings.get_profile("models")
def test_the_output_stays(model):
    before, after, ids, (_, report) = before_and_after(model, Untie(), FoldNorm(open_streams=True))
    assert report.done
    assert_equivalent(before, after, [ids])
    assert_equivalent(before, after, [model.example(3, 9)])


@pytest.mark.parametrize("norm", ["rms", "one_plus", "layer"])
def test_post_norm_is_refused_with_its_node(norm):
    model = Decoder(shape(norm=norm, post_norm=True))
    *_, reports = before_and_after(model, FoldNorm(), Rotate())
    assert any("read by something that is not a linear" in place.reason and place.node for place in reports[0].skipped)
    assert any("gain" in place.reason and place.node for place in reports[1].skipped if "stream" in place.site)


@pytest.mark.parametrize("norm", ["rms", "one_plus", "layer"])
def test_folded_norms_have_gain_one_and_no_mean_to_subtract(norm):
    before, after, ids, (report,) = before_and_after(Decoder(shape(norm=norm)), FoldNorm())
    assert_equivalent(before, after, [ids])
    norms = find_norms(after)
    assert len(norms) == 5 and all(found.gain is None or found.has_unit_gain(after) for found in norms), report
    assert {found.kind for found in norms} == {"rms"}
    config = FoldNorm(center=False, open_streams=True)
    before, after, ids, _ = before_and_after(Decoder(shape(norm=norm)), config)
    assert_equivalent(before, after, [ids])
    assert {found.kind for found in find_norms(after)} == {"layer" if norm == "layer" else "rms"}


def test_a_shift_becomes_the_bias_that_a_linear_lacks():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False)).requires_grad_(False)
    model[0].weight.copy_(torch.rand(6) + 0.5)
    model[0].bias.copy_(torch.randn(6))
    x = torch.randn(3, 6, dtype=torch.float64)
    before = capture(model.double(), (x,))
    after = before.copy()
    rewrite(after, FoldNorm(open_streams=True), batches=[[x]])
    assert_equivalent(before, after, [x])
    assert torch.allclose(after.weights["1.bias"], model[1].weight @ model[0].bias)
    assert torch.equal(after.weights["0.bias"], torch.zeros(6, dtype=torch.float64))


class Sandwich(nn.Module):
    """A norm in front of the residual sum: its gain cannot be folded, so the stream keeps its basis."""

    def __init__(self, sandwich):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.before, self.last = nn.RMSNorm(8), nn.RMSNorm(8)
        self.after = nn.RMSNorm(8) if sandwich else nn.Identity()
        self.linear = nn.Linear(8, 8)
        self.double().requires_grad_(False)
        for norm in (self.before, self.after, self.last):
            if sandwich or norm is not self.after:
                norm.weight.copy_(torch.rand(8) + 0.5)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.last(x + self.after(self.linear(self.before(x)))))


def test_all_norms_of_a_stream_are_folded_or_none():
    ids = torch.randint(11, (2, 4))
    for sandwich in (False, True):
        before = capture(Sandwich(sandwich), (ids,))
        after = before.copy()
        folded, rotated = rewrite(after, FoldNorm(), Rotate(heads=False), batches=[[ids]])
        assert_equivalent(before, after, [ids])
        assert len(folded.done) == (0 if sandwich else 2) and len(rotated.done) == (0 if sandwich else 1)
        if sandwich:
            (place,) = folded.skipped
            assert place.site.startswith("3 norms of the stream of 8") and "could not be rotated then" in place.reason
            assert "read by something that is not a linear" in place.reason and place.node
            assert all(after.weights[name] is tensor for name, tensor in before.weights.items())
    before = capture(Sandwich(True), (ids,))
    after = before.copy()
    (folded,) = rewrite(after, FoldNorm(open_streams=True), batches=[[ids]])
    assert_equivalent(before, after, [ids])
    assert len(folded.done) == 2 and len(folded.skipped) == 1


class Mixed(Sandwich):
    """A LayerNorm and an RMSNorm on one stream: its mean may not be folded away."""

    def __init__(self):
        super().__init__(False)
        self.last = nn.LayerNorm(8).double().requires_grad_(False)
        self.last.weight.copy_(torch.rand(8) + 0.5)


STREAMS_THAT_STAY = {
    "a tied table": (lambda: Decoder(shape(tied=True)), FoldNorm(), "tied to|linear's weight too"),
    "means that are not folded": (lambda: Decoder(shape(norm="layer")), FoldNorm(center=False), "subtracts a mean"),
    "two kinds of norms": (Mixed, FoldNorm(), "holds RMSNorms too"),
}


@pytest.mark.parametrize("name", STREAMS_THAT_STAY)
def test_a_stream_that_could_not_be_rotated_keeps_its_gains(name):
    make, config, words = STREAMS_THAT_STAY[name]
    model = make()
    ids = model.example() if isinstance(model, Decoder) else torch.randint(11, (2, 4))
    program = capture(model, (ids,)).widened()
    before = dict(program.weights)
    (report,) = rewrite(program, config, batches=[[ids]])
    assert not report.done and all(program.weights[name] is tensor for name, tensor in before.items())
    (place,) = report.skipped
    assert re.search(words, place.reason), place


OPEN = FoldNorm(open_streams=True)
X = torch.randn(2, 3, 8, dtype=torch.float64)


class Norms(nn.Module):
    """Two LayerNorms that share what is given, and what reads them."""

    def __init__(self, function, shared=(), eps=1e-5):
        super().__init__()
        self.first, self.second, self.function = nn.LayerNorm(8, eps=eps), nn.LayerNorm(8, eps=eps), function
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        for norm in (self.first, self.second):
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
        for name in shared:
            setattr(self.second, name, getattr(self.first, name))

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_gain_or_a_shift_that_another_norm_uses_is_not_folded(name):
    model = Norms(lambda m, x: m.a(m.first(x)) + m.second(x).sin(), [name])
    *_, (report,) = rewritten(model, OPEN, x=X)
    assert not report.done and "its gain is used elsewhere too" in {place.reason for place in report.skipped}


STAY = {
    "another reader": (lambda m, x: m.a(y := m.first(x)) + y.sin(), "is not a linear"),
    "a linear that is used twice": (lambda m, x: m.a(m.first(x)) + m.a(x), "the weight of a.weight is tied"),
    "a shift for a weight without a module": (
        lambda m, x: nn.functional.linear(m.first(x), m.b.weight), "no module could hold a bias"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_what_else_a_fold_would_change_is_named(name):
    function, reason = STAY[name]
    *_, (report,) = rewritten(Norms(function), OPEN, x=X)
    assert not report.done and any(reason in place.reason for place in report.skipped), report.skipped


def test_a_gain_alone_gives_no_bias():
    model = Norms(lambda m, x: m.b(m.first(x)))
    model.first.bias.data.zero_()
    before, after, (report,) = rewritten(model, OPEN, x=X)
    assert report.done and after.weights.keys() == before.weights.keys()


def test_the_epsilon_of_a_layer_norm_stays():
    class Embedded(Norms):
        def __init__(self):
            super().__init__(None, eps=0.3)
            self.table = nn.Embedding(11, 8)

        def forward(self, ids):
            x = self.table(ids)
            x = x + self.a(self.first(x))
            return self.b(torch.layer_norm(x, (8,), self.second.weight, self.second.bias))  # of the default epsilon

    *_, (report,) = rewritten(Embedded(), FoldNorm(), x=torch.randint(11, (2, 3)))
    assert sum("RMSNorm" in done for done in report.done) == 2


@pytest.mark.parametrize(
    "changes", [dict(tied=True), dict(post_norm=True), dict(tied=True, norm="rms")], ids=["tied", "post", "tied rms"]
)
def test_open_streams_are_not_centered(changes):
    model = Decoder(shape(**{"norm": "layer", **changes}))
    ids = model.example()
    before, after, (report,) = rewritten(model, OPEN, x=ids)
    assert report.skipped and not any("RMSNorm" in done for done in report.done)


def test_a_stream_with_both_kinds_of_norms_is_not_centered():
    *_, (report,) = rewritten(Mixed(), OPEN, x=torch.randint(11, (2, 4)))
    assert len(report.done) == 2 and any("holds RMSNorms too" in place.reason for place in report.skipped)


@pytest.mark.parametrize("norm", ["one_plus", "layer"])
def test_weights_are_rounded_once(norm):
    assert_rounded_once(Decoder(shape(norm=norm, bias=False)), FoldNorm(center=norm == "layer"))


def test_norms_of_gain_one_are_left_alone():
    model = Norms(lambda m, x: m.a(m.first(x)))
    nn.init.ones_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    before, after, (report,) = rewritten(model, OPEN, x=X)
    assert not report.done and all(after.weights[name] is tensor for name, tensor in before.weights.items())


def test_a_gain_folds_into_a_weight_without_a_module():
    model = Norms(lambda m, x: nn.functional.linear(nn.functional.rms_norm(x, (8,), m.first.weight, 1e-5), m.b.weight))
    *_, (report,) = rewritten(model, OPEN, x=X)
    assert report.done == ["rms_norm"]


def test_a_shift_is_added_before_rounding():
    """A bit more than half of a bias's last place: rounded first, it is half, and is lost."""
    model = Norms(lambda m, x: m.a(m.first(x))).bfloat16().requires_grad_(False)
    for tensor in (model.first.weight, model.first.bias, model.a.bias):
        tensor.fill_(1)
    model.a.weight.zero_()
    model.a.weight[:, 0], model.a.weight[:, 1] = 2**-8, 2**-17
    program = capture(model, (X.bfloat16(),))
    rewrite(program, OPEN, batches=[[X.bfloat16()]])
    assert program.weights["a.bias"].tolist() == [1 + 2**-7] * 8


class Streams(nn.Module):
    """A stream whose norms could be folded, and what else `function` computes."""

    def __init__(self, function, norm=nn.RMSNorm):
        super().__init__()
        self.table, self.head, self.function = nn.Embedding(11, 8), nn.Linear(8, 11), function
        self.norms, self.linear = nn.ModuleList(norm(8) for _ in range(2)), nn.Linear(8, 8)
        self.extra = nn.Linear(8, 8)
        self.outside = nn.Parameter(torch.randn(2, 4, 8))
        for gain in self.norms:
            gain.weight.data.uniform_(0.5, 2)

    def forward(self, ids):
        x = self.table(ids)
        return self.function(self, x + self.linear(self.norms[0](x)))


OUTSIDE = {
    "a table of another linear": (
        lambda m, x: m.head(m.norms[1](x)) + nn.functional.linear(m.outside.sin(), m.table.weight), "weight too"
    ),
    "a producer that is used twice": (
        lambda m, x: m.head(m.norms[1](x + m.extra(m.outside.sin()))) + m.extra(m.outside.cos()).sum(), "is tied to"
    ),
    "an output": (lambda m, x: (m.head(m.norms[1](x)), x), "leaves the graph"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_gains_of_streams_that_cannot_be_rotated_stay(name):
    function, reason = OUTSIDE[name]
    *_, (report,) = rewritten(Streams(function), FoldNorm(), x=torch.randint(11, (2, 4)))
    assert not report.done and any(reason in place.reason for place in report.skipped), report.skipped


@pytest.mark.parametrize("function", [
    lambda m, x: m.head(m.norms[1](x + m.extra(m.outside.sin()))) + m.extra(m.outside.cos()).sum(),
    lambda m, x: m.head(m.norms[1](x)) + nn.functional.linear(m.outside.sin(), m.table.weight),
])  # fmt: skip
def test_what_something_outside_reads_is_not_centered(function):
    model = Streams(function, nn.LayerNorm)
    *_, (report,) = rewritten(model, OPEN, x=torch.randint(11, (2, 4)))
    assert not any("RMSNorm" in done for done in report.done)
    assert any("is tied" in place.reason or "weight too" in place.reason for place in report.skipped)


def with_gains_of_one(read):
    model = Streams(read, nn.LayerNorm)
    for norm in model.norms:
        nn.init.ones_(norm.weight)
    return model


@pytest.mark.parametrize("read", [
    lambda m, x: m.head(x),
    lambda m, x: m.head(m.norms[1](x) + m.extra(m.norms[1](x))),
    lambda m, x: m.head(m.norms[1](x)) + m.extra(m.norms[1](x) + x * 2).sum(),
], ids=["no norm", "a sum with a producer", "a sum with the stream"])  # fmt: skip
def test_a_stream_whose_mean_a_linear_reads_is_not_centered(read):
    ids = torch.randint(11, (2, 4))
    before, after, (report,) = rewritten(with_gains_of_one(read), FoldNorm(), x=ids)
    assert_equivalent(before, after, [ids])
    assert not report.done and any("the mean matters to it" in place.reason for place in report.skipped), report


def test_a_stream_whose_mean_a_linear_reads_keeps_its_gains():
    *_, (report,) = rewritten(Streams(lambda m, x: m.head(x), nn.LayerNorm), FoldNorm(), x=torch.randint(11, (2, 4)))
    assert not report.done and any(place.site.startswith("1 norms") for place in report.skipped), report


def test_sums_and_views_of_what_layer_norms_give_have_no_mean():
    ids = torch.randint(11, (2, 4))
    model = with_gains_of_one(lambda m, x: m.head((m.norms[0](x) + m.norms[1](x)).flatten(0, 1) * 2))
    before, after, (report,) = rewritten(model, FoldNorm(), x=ids)
    assert_equivalent(before, after, [ids])
    assert sum("RMSNorm" in done for done in report.done) == 3
