"""SmoothAttention's law: what keys are divided by, queries are multiplied by, pair by pair of a rotary embedding."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from laws import before_and_after, rewrite, shape

from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.passes import SmoothAttention
from qcompile.testing import Decoder, assert_equivalent, decoders


@given(decoders())
@settings(max_examples=12)
def test_the_output_stays_and_rotary_pairs_share_a_factor(model):
    before, after, ids, (report,) = before_and_after(model, SmoothAttention())
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


def test_it_evens_the_keys():
    model = Decoder(shape(rotary="half"))
    ids = model.example()
    with torch.no_grad():
        model.blocks[0].key.weight[3] *= 60
    program = capture(model, (ids,)).widened()
    first = next(iter(observe(program, [[ids]]).keys.values()))
    rewrite(program, SmoothAttention(), batches=[[ids]])
    after = next(iter(observe(program, [[ids]]).keys.values()))
    assert after[0].max() / after[0].median() < first[0].max() / first[0].median() / 3


def test_a_norm_of_queries_is_refused():
    model = Decoder(shape(rotary="half", qk_norm=True))
    before, after, ids, (report,) = before_and_after(model, SmoothAttention())
    assert not report.done and all(
        "not linear in each channel" in place.reason and place.node for place in report.skipped
    )
    assert len(report.skipped) == model.shape.layers
