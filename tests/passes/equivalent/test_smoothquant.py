"""SmoothQuant's law, its scales, and the percentile variant that touches only outlier channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from laws import before_and_after, rewrite, shape

from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.passes import OnlineHadamard, SmoothQuant, Untie
from qcompile.passes.equivalent.smoothquant import clip_scale, shared_scale, smoothing_scale
from qcompile.testing import Decoder, assert_equivalent, decoders, mlps


@given(decoders())
@settings(max_examples=12)
def test_the_output_stays(model):
    before, after, ids, (_, report) = before_and_after(model, Untie(), SmoothQuant())
    assert report.done
    assert_equivalent(before, after, [ids])


@given(mlps())
def test_the_output_of_an_mlp_stays(model):
    x = torch.randn(5, model[0].in_features, dtype=torch.float64)
    before = capture(model.double(), (x,))
    after = before.copy()
    rewrite(after, SmoothQuant(), OnlineHadamard(), batches=[[x]])
    assert_equivalent(before, after, [x])


def test_smoothing_moves_the_outlier():
    model = Decoder(shape(norm="rms"))
    ids = model.example()
    program = capture(model, (ids,)).widened()
    first = next(n for n in observe(program, [[ids]]).absmax.values())
    rewrite(program, SmoothQuant(alpha=0.5), batches=[[ids]])
    after = next(n for n in observe(program, [[ids]]).absmax.values())
    assert after.max() / after.median() < first.max() / first.median() / 3


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_scale_is_the_papers(alpha):
    act, weight = torch.tensor([4.0, 9.0, 0.0, 2.0]), torch.tensor([16.0, 1.0, 3.0, 0.0])
    want = torch.tensor([4.0**alpha / 16 ** (1 - alpha), 9.0**alpha, 1.0, 1.0], dtype=torch.float64)  # dead: 1
    assert torch.allclose(smoothing_scale(act, weight, alpha), want)


def test_channels_that_one_row_feeds_share_the_largest_scale():
    by_channel, by_row = shared_scale(torch.tensor([2.0, 3.0, 5.0, 1.0]), torch.tensor([0, 2, 0, 2]), 4)
    assert by_channel.tolist() == [5, 3, 5, 3] and by_row.tolist() == [5, 1, 3, 1]


def test_either_kind_of_place_can_be_excluded():
    model = Decoder(shape())
    *_, (rows,) = before_and_after(model, SmoothQuant(norms=False))
    *_, (norms,) = before_and_after(model, SmoothQuant(rows=False))
    *_, (both,) = before_and_after(model, SmoothQuant())
    assert not set(rows.done) & set(norms.done) and {*rows.done, *norms.done} == set(both.done)
    assert "its input comes from a norm, and norms=False" in {place.reason for place in rows.skipped}
    assert "its input comes from linear rows, and rows=False" in {place.reason for place in norms.skipped}


def test_percentile_smoothing_touches_only_outliers():
    act = torch.rand(1000) + 0.5
    act[7] = 80.0
    scale = clip_scale(act, 0.005)
    assert float((scale == 1).double().mean()) >= 0.99 and float(scale[7]) > 50
    assert float((act / scale).max()) == pytest.approx(float(act.sort(descending=True).values[6]))
    assert bool((clip_scale(torch.zeros(10), 0.1) == 1).all())
