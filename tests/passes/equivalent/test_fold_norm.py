"""FoldNorm's law: gains, shifts and means of norms move into the linears around them."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from laws import before_and_after, rewrite, shape
from torch import nn

from qcompile.analysis.norms import find_norms
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm, Rotate, Untie
from qcompile.testing import Decoder, assert_equivalent, decoders


@given(decoders())
@settings(max_examples=12)
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
    assert any(re.search(words, place.reason) for place in report.skipped), report.skipped
