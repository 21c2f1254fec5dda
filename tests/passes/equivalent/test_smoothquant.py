"""SmoothQuant's law, its scales, and the percentile variant that touches only outlier channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from laws import UsedTwice, assert_rounded_once, before_and_after, rewrite, rewritten, shape
from torch import nn

from qcompile.calibration.statistics import observe
from qcompile.ir.capture import capture
from qcompile.passes import OnlineHadamard, SmoothQuant, Untie
from qcompile.passes.equivalent.smoothquant import clip_scale, shared_scale, smoothing_scale
from qcompile.testing import Decoder, assert_equivalent, decoders, mlps


@given(decoders())
@settings.get_profile("models")
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


def test_a_percentile_of_all_channels_stays_within_them():
    assert bool((clip_scale(torch.tensor([1.0, 2.0, 4.0]), 0.99) == torch.tensor([1.0, 2.0, 4.0])).all())
    assert clip_scale(torch.arange(1.0, 11.0), 0.25).tolist() == [1.0] * 6 + [7 / 6, 8 / 6, 9 / 6, 10 / 6]


def test_a_weight_is_as_large_as_its_least_and_greatest_entries_of_all_sites():
    """Columns whose sign is negative, and siblings: max|W| is that of both; the scale follows from it."""
    model = nn.Sequential(nn.LayerNorm(4), Siblings())
    x = torch.randn(3, 4, dtype=torch.float64)
    before, after, (report,) = rewritten(model, SmoothQuant(alpha=0.0), x=x)
    scale = before.weights["0.weight"] / after.weights["0.weight"]
    assert report.done == ["1.a.weight"] and torch.allclose(scale, torch.tensor([1 / 4, 1 / 7, 1 / 2, 1.0]).double())
    assert torch.allclose(after.weights["1.b.weight"], before.weights["1.b.weight"] * scale)


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[-4.0, 1, 2, 0], [3.0, -5, 1, 0]]))
            self.b.weight.copy_(torch.tensor([[1.0, 1, 1, 0], [1.0, 7, -2, 0]]))

    def forward(self, y):
        return self.a(y), self.b(y)


@pytest.mark.parametrize("percentile", [None, 0.2])
def test_a_weight_that_is_used_twice_takes_no_scale(percentile):
    x = torch.randn(3, 8, dtype=torch.float64)
    *_, (report,) = rewritten(UsedTwice(), SmoothQuant(percentile=percentile), x=x)
    assert not report.done and any("is tied to" in place.reason for place in report.skipped)


@pytest.mark.parametrize("norm", ["one_plus", "layer"])
def test_weights_are_rounded_once(norm):
    """Of siblings behind one norm, and of rows behind a gate."""
    assert_rounded_once(Decoder(shape(norm=norm, layers=1)), SmoothQuant(rows=False))
    assert_rounded_once(Decoder(shape(norm=norm, layers=1)), SmoothQuant(norms=False))


def test_the_report_names_every_value_that_changes():
    model = Decoder(shape(layers=1, norm="one_plus"))
    *_, (report,) = rewritten(model, SmoothQuant(), x=model.example())
    assert report.done
    model = nn.Sequential(nn.LayerNorm(8), nn.Flatten(0, 1), nn.Linear(8, 4))
    *_, (report,) = rewritten(model, SmoothQuant(), x=torch.randn(2, 3, 8, dtype=torch.float64))
    assert report.done == ["2.weight"]


@pytest.mark.parametrize("config", [dict(alpha=-0.1), dict(alpha=1.1), dict(percentile=0.0), dict(percentile=1.0)])
def test_bad_configs(config):
    with pytest.raises(ValueError, match="SmoothQuant: "):
        SmoothQuant(**config)


def test_a_percentile_is_used_instead_of_alpha():
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), torch.randn(5, 8, dtype=torch.float64)
    before, after, _ = rewritten(model, SmoothQuant(percentile=0.2), x=x)
    act = observe(before, [[x]]).absmax["layer_norm"]
    scale = before.weights["0.weight"] / after.weights["0.weight"]
    assert torch.allclose(scale, clip_scale(act, 0.2)) and 1 in scale.tolist()


def test_a_shift_is_divided_as_its_gain_is():
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)), torch.randn(5, 8, dtype=torch.float64)
    nn.init.normal_(model[0].bias)
    before, after, _ = rewritten(model, SmoothQuant(), x=x)
    scale = before.weights["0.weight"] / after.weights["0.weight"]
    assert torch.allclose(after.weights["0.bias"], before.weights["0.bias"] / scale)
