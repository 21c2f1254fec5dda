"""SmoothAttention's law: what keys are divided by, queries are multiplied by, pair by pair of a rotary embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from laws import assert_rounded_once, before_and_after, rewrite, rewritten, shape
from torch import nn

from qcompile.analysis.attention_scores import AttentionScores
from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.passes import SmoothAttention
from qcompile.passes.equivalent.smooth_attention import key_scale
from qcompile.testing import Decoder, assert_equivalent, decoders


@given(decoders())
@settings.get_profile("models")
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


class Fused(nn.Module):
    """Queries, keys and values from one linear, in grouped heads if `grouped`."""

    def __init__(self, grouped):
        super().__init__()
        self.qkv, self.grouped = nn.Linear(8, 16 if grouped else 24), grouped

    def forward(self, x):
        parts = self.qkv(x).split([8, 4, 4] if self.grouped else [8, 8, 8], -1)
        q, k, v = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in parts)
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_of_one_linear_are_scaled_as_queries_as_keys_or_not_at_all(grouped):
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    before, after, (report,) = rewritten(Fused(grouped), SmoothAttention(alpha=0.7), x=x)
    factor = (after.weights["qkv.weight"] / before.weights["qkv.weight"])[:, 0]
    keys = observe(before, [[x]]).keys.popitem()[1].double()  # [H, D]
    by_query = keys.repeat_interleave(2, 0) if grouped else keys
    assert torch.allclose(factor[:8], by_query.flatten() ** 0.7)
    assert torch.allclose(factor[8 : -len(factor) // 4 if grouped else 16], keys.flatten() ** -0.7)
    assert bool((factor[12 if grouped else 16 :] == 1).all()) and report.done == ["qkv.weight"]
    assert torch.allclose(after.weights["qkv.bias"], before.weights["qkv.bias"] * factor)


@pytest.mark.parametrize("order", ["vqk", "vkq"])
def test_rows_of_values_stay_where_keys_or_queries_come_last(order):
    class Last(Fused):
        def forward(self, x):
            parts = (part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
            named = dict(zip(order, parts, strict=True))
            return nn.functional.scaled_dot_product_attention(named["q"], named["k"], named["v"])

    before, after, (report,) = rewritten(Last(False), SmoothAttention(), x=torch.randn(2, 3, 8, dtype=torch.float64))
    assert report.done == ["qkv.weight"]
    assert torch.equal(after.weights["qkv.weight"][:8], before.weights["qkv.weight"][:8])


def test_keys_that_are_zero_stay():
    model = Fused(False)
    with torch.no_grad():
        model.qkv.weight[9], model.qkv.bias[9] = 0.0, 0.0
        model.qkv.weight[10] *= 1e-9
        model.qkv.bias[10] = 0.0
    before, after, _ = rewritten(model, SmoothAttention(), x=torch.randn(2, 3, 8, dtype=torch.float64))
    factor = (after.weights["qkv.weight"] / before.weights["qkv.weight"])[:, 0]
    assert float(factor[1]) == 1 and float(factor[2]) == pytest.approx(1e-5**0.5)


def test_weights_are_rounded_once():
    assert_rounded_once(Decoder(shape(layers=1, rotary="half")), SmoothAttention())


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_bad_configs(alpha):
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        SmoothAttention(alpha)


def test_a_pair_takes_its_larger_absmax():
    found = AttentionScores(
        None, None, (), torch.tensor([0, 1, 0, 1]), torch.tensor([True, True, False, False]),
        torch.tensor([[0, 1], [0, 1]]), frozenset(),
    )  # fmt: skip
    scale = key_scale(torch.tensor([[4.0, 9.0], [16.0, 1.0]]), found, 0.5)
    assert scale.tolist() == [4.0, 3.0, 4.0, 3.0]


def test_weights_and_biases_of_two_linears():
    model = Decoder(shape(layers=1, rotary="half"))
    before, after, (report,) = rewritten(model, SmoothAttention(), x=model.example())
    assert report.done == ["blocks.0.query.weight", "blocks.0.key.weight"]
    changed = {name for name, tensor in after.weights.items() if not torch.equal(tensor, before.weights[name])}
    assert changed == {f"blocks.0.{name}.{part}" for name in ("query", "key") for part in ("weight", "bias")}
