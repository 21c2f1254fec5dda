"""FoldNorm's law: gains, shifts and means of norms move into the linears around them."""

from __future__ import annotations

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
    before, after, ids, (_, report) = before_and_after(model, Untie(), FoldNorm())
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
    before, after, ids, _ = before_and_after(Decoder(shape(norm=norm)), FoldNorm(center=False))
    assert_equivalent(before, after, [ids])
    assert {found.kind for found in find_norms(after)} == {"layer" if norm == "layer" else "rms"}


def test_a_shift_becomes_the_bias_that_a_linear_lacks():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4, bias=False)).requires_grad_(False)
    model[0].weight.copy_(torch.rand(6) + 0.5)
    model[0].bias.copy_(torch.randn(6))
    x = torch.randn(3, 6, dtype=torch.float64)
    before = capture(model.double(), (x,))
    after = before.copy()
    rewrite(after, FoldNorm(), batches=[[x]])
    assert_equivalent(before, after, [x])
    assert torch.allclose(after.weights["1.bias"], model[1].weight @ model[0].bias)
    assert torch.equal(after.weights["0.bias"], torch.zeros(6, dtype=torch.float64))
