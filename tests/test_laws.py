"""The laws of the exact passes as properties over random decoders, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from qcompile.analysis.scale_folding import groups_of_consumers
from qcompile.analysis.sites import find_sites
from qcompile.calibration.statistics import Statistics, observe
from qcompile.ir.capture import capture
from qcompile.passes import FoldNorm, OnlineHadamard, ReorderChannels, Rotate, SmoothAttention, SmoothQuant, Untie
from qcompile.passes.equivalent.fold_norm import fold_norm
from qcompile.passes.equivalent.online_hadamard import online_hadamard
from qcompile.passes.equivalent.reorder_channels import reorder
from qcompile.passes.equivalent.rotate import rotate
from qcompile.passes.equivalent.smooth_attention import smooth_attention
from qcompile.passes.equivalent.smoothquant import smooth
from qcompile.passes.equivalent.untie import untie
from qcompile.testing import Decoder, assert_equivalent, decoders, mlps

FEW = settings(max_examples=12)


def before_and_after(model, *steps, data=False):
    ids = model.example()
    before = capture(model, (ids,)).widened()
    after = before.copy()
    reports = []
    for function, how in steps:
        seen = observe(after, [[ids]]) if data and function in (smooth, smooth_attention, reorder) else Statistics()
        reports.append(function(after, how, seen))
        after.cleanup()
    return before, after, ids, reports


@given(decoders())
@FEW
def test_fold_norm(model):
    before, after, ids, (_, report) = before_and_after(model, (untie, Untie()), (fold_norm, FoldNorm()))
    assert report.done
    assert_equivalent(before, after, [ids])
    assert_equivalent(before, after, [model.example(3, 9)])


@given(decoders())
@FEW
def test_smooth(model):
    before, after, ids, (_, report) = before_and_after(model, (untie, Untie()), (smooth, SmoothQuant()), data=True)
    assert report.done
    assert_equivalent(before, after, [ids])


@given(decoders())
@FEW
def test_smooth_attention(model):
    before, after, ids, (report,) = before_and_after(model, (smooth_attention, SmoothAttention()), data=True)
    assert len(report.done) == 2 * model.shape.layers, report
    assert_equivalent(before, after, [ids])
    assert_equivalent(before, after, [model.example(3, 9)])
    query, key = "blocks.0.query.weight", "blocks.0.key.weight"
    ratio = after.weights[key] / before.weights[key]
    assert bool((ratio > 0).all()) and not torch.allclose(ratio, torch.ones_like(ratio)), "nothing was moved"
    factor = (after.weights[query] / before.weights[query])[:, 0].view(-1, model.shape.head)
    partner = {"half": factor.roll(model.shape.head // 2, 1), "interleaved": factor.view(-1, 2).flip(1)}
    if model.shape.rotary != "none":
        assert torch.allclose(factor, partner[model.shape.rotary].reshape(factor.shape))


def test_smooth_attention_evens_the_keys():
    model = Decoder(shape(rotary="half"))
    ids = model.example()
    with torch.no_grad():
        model.blocks[0].key.weight[3] *= 60
    program = capture(model, (ids,)).widened()
    first = next(iter(observe(program, [[ids]]).keys.values()))
    smooth_attention(program, SmoothAttention(), observe(program, [[ids]]))
    after = next(iter(observe(program, [[ids]]).keys.values()))
    assert after[0].max() / after[0].median() < first[0].max() / first[0].median() / 3


def test_smooth_attention_refuses_a_norm_of_queries():
    model = Decoder(shape(rotary="half", qk_norm=True))
    before, after, ids, (report,) = before_and_after(model, (smooth_attention, SmoothAttention()), data=True)
    assert not report.done and all(
        "not linear in each channel" in place.reason and place.node for place in report.skipped
    )
    assert len(report.skipped) == model.shape.layers


@given(decoders())
@FEW
def test_reorder(model):
    steps = (untie, Untie()), (fold_norm, FoldNorm()), (reorder, ReorderChannels(stream=True))
    before, after, ids, (_, _, report) = before_and_after(model, *steps, data=True)
    assert_equivalent(before, after, [ids])
    assert_equivalent(before, after, [model.example(3, 9)])
    rows = [d for d in report.done if "stream" not in d]
    assert len(rows) == 2 * model.shape.layers, report  # after attention and after the gate or the ReLU
    assert any("stream" in d for d in report.done) == (not model.shape.post_norm), report
    head, peaks = model.shape.head, observe(after, [[ids]]).absmax
    by_site = {g.sites[0].name: peaks[g.root.name] for g in groups_of_consumers(find_sites(after)) if g.sites}
    falls = by_site["blocks.0.fall.weight"]
    assert bool((falls[:-1] >= falls[1:] - 1e-9).all())
    shared = by_site["blocks.0.mix.weight"].view(model.shape.kv_heads, -1, head).amax(1)
    assert bool((shared[:, :-1] >= shared[:, 1:] - 1e-9).all())


@given(decoders())
@FEW
def test_rotate(model):
    steps = (untie, Untie()), (fold_norm, FoldNorm()), (rotate, Rotate(seed=3)), (online_hadamard, OnlineHadamard())
    before, after, ids, reports = before_and_after(model, *steps)
    assert_equivalent(before, after, [ids])
    turned = [d for d in reports[2].done if "stream" in d]
    assert bool(turned) == (not model.shape.post_norm), reports[2]
    heads = [d for d in reports[2].done if "heads" in d]
    assert len(heads) == model.shape.layers


@given(mlps())
def test_mlp(model):
    x = torch.randn(5, model[0].in_features, dtype=torch.float64)
    before = capture(model.double(), (x,))
    after = before.copy()
    smooth(after, SmoothQuant(), observe(after, [[x]]))
    online_hadamard(after, OnlineHadamard(), Statistics())
    after.cleanup()
    assert_equivalent(before, after, [x])


def test_smoothing_moves_the_outlier():
    model = Decoder(shape(norm="rms"))
    ids = model.example()
    program = capture(model, (ids,)).widened()
    first = next(n for n in observe(program, [[ids]]).absmax.values())
    smooth(program, SmoothQuant(alpha=0.5), observe(program, [[ids]]))
    after = next(n for n in observe(program, [[ids]]).absmax.values())
    assert after.max() / after.median() < first.max() / first.median() / 3


def test_rotation_spreads_the_outlier():
    model = Decoder(shape(norm="rms", width=64))
    ids = model.example()
    with torch.no_grad():
        model.table.weight[:, 5] *= 100
    program = capture(model, (ids,)).widened()
    fold_norm(program, FoldNorm(), Statistics())
    first = next(iter(observe(program, [[ids]]).absmax.values()))
    rotate(program, Rotate(), Statistics())
    after = next(iter(observe(program, [[ids]]).absmax.values()))
    assert first.max() / first.median() > 10 > 4 > after.max() / after.median()


def shape(**changes):
    from qcompile.testing import Shape

    base = dict(
        width=16, heads=4, kv_heads=2, head=8, inner=24, layers=2, norm="rms", gated=True, bias=True,
        tied=False, post_norm=False, seed=0,
    )  # fmt: skip
    return Shape(**{**base, **changes})


@pytest.mark.parametrize("norm", ["rms", "one_plus", "layer"])
def test_post_norm_is_refused_with_its_node(norm):
    model = Decoder(shape(norm=norm, post_norm=True))
    *_, reports = before_and_after(model, (fold_norm, FoldNorm()), (rotate, Rotate()))
    assert any("read by something that is not a linear" in place.reason and place.node for place in reports[0].skipped)
    assert any("gain" in place.reason and place.node for place in reports[1].skipped if "stream" in place.site)


def test_tied_weights_are_refused_until_untied():
    model = Decoder(shape(tied=True))
    *_, reports = before_and_after(model, (fold_norm, FoldNorm()), (rotate, Rotate()))
    assert any("untie" in place.reason for place in reports[0].skipped)
    *_, reports = before_and_after(model, (untie, Untie()), (fold_norm, FoldNorm()), (rotate, Rotate()))
    assert not reports[1].skipped and any("stream" in d for d in reports[2].done)
