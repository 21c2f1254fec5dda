"""Speed of sites that train: at which size they are judged, and what a report says of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcompile.analysis.facts import Facts
from qcompile.backend import training_speed as subject
from qcompile.backend.training_speed import report_speeds, slower_sites, some, training_speeds
from qcompile.codegen.cpu.training_kernel_choice import TrainingShape
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.ir.capture import capture
from qcompile.passes import FixedPoint, QGaLore
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import PassReport, Report, SiteReport

RECIPE = Recipe("all", (FixedPoint(),))


class Net(nn.Module):
    """Convolutions of both kinds, and a linear that is called twice."""

    def __init__(self):
        super().__init__()
        self.plane, self.line = nn.Conv2d(3, 8, (3, 5), (1, 2), groups=1), nn.Conv1d(8, 8, 3, groups=4)
        self.twice = nn.Linear(4, 4)

    def forward(self, x):
        x = self.line(self.plane(x).flatten(2))[:, :, :4]
        return self.twice(x + self.twice(x.mean(1)).unsqueeze(1))


def speeds(recipe=RECIPE, rows=None):
    return training_speeds(Facts(capture(Net(), (torch.randn(6, 3, 8, 9),))), recipe, rows)


@pytest.fixture
def asked(monkeypatch):
    """The shapes and dtypes that were asked for; every answer is the ratio 0.5."""
    found = []

    def choose(shape, dtype):
        found.append((shape, dtype))
        return KernelChoice(shape.kernel, 0.5, "0.5x float")

    monkeypatch.setattr(subject, "choose_training_kernel", choose)
    return found


def test_sites_are_judged_at_their_sizes(asked):
    found = speeds()
    shapes = [shape for shape, dtype in asked if dtype == torch.float32]
    assert TrainingShape(6 * 6 * 3, 3, 8, 15, 2, 2, 1) in shapes and TrainingShape(6 * 16, 2, 8, 3, 1, 1, 4) in shapes
    assert TrainingShape(6 * 8, 4, 4) in shapes and TrainingShape(6, 4, 4) in shapes
    assert found["twice.weight"].label.startswith("rows 48"), "the call with the most rows"
    assert found["plane.weight"].label == "108 positions"
    assert str(found["line.weight"]) == "fixed_point_conv_grouped (0.5x float) at 96 positions"


def test_the_rows_of_linears_may_be_given(asked):
    assert speeds(rows=512)["twice.weight"].label == "rows 512 (option)"
    assert TrainingShape(512, 4, 4) in [shape for shape, _ in asked]


def test_other_recipes_have_no_such_sites(asked):
    assert speeds(Recipe("low rank", (QGaLore(),))) == {} and not asked


def test_slower_sites_have_a_reason():
    def choice(ratio):
        return subject.TrainingSpeed(KernelChoice("k", ratio, "note"), 8, "rows 8")

    found = {"a": choice(0.5), "b": choice(0.95), "c": choice(None)}
    assert slower_sites(found, "x=1") == {"a": "k (note) at rows 8: slower than float (x=1 trains it)"}


def test_a_report_names_kernels_and_the_slower_ones():
    def choice(ratio):
        return subject.TrainingSpeed(KernelChoice("k", ratio, f"{ratio}x float"), 8, "rows 8")

    found = {"a": choice(0.5), "b": choice(2.0), "c": choice(0.2), "left": choice(0.1)}
    done = PassReport("FixedPoint", done=["a", "b", "c"])
    report = Report("r", [SiteReport(name, 4, 4) for name in found], [done])
    assert report_speeds(report, found) == ["c: k (0.2x float) at rows 8", "a: k (0.5x float) at rows 8"]
    assert "2 of 3 sites train slower than in float: c: k (0.2x float)" in done.notes[0]
    assert [site.kernel for site in report.sites] == [
        {"rows 8": f"k ({ratio}x float)"} for ratio in (0.5, 2.0, 0.2)
    ] + [{}]


def test_long_lists_are_cut():
    assert some(["a", "b", "c"]) == "a; b; c" and some(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"
