"""The search for the cheapest recipe: where it stops, what it remembers, what it refuses."""

from __future__ import annotations

import pytest
import torch

import qcompile.evaluation.compare
from qcompile.evaluation.compare import Comparison, RecipeResult
from qcompile.evaluation.tune import LADDER, plot_frontier, tune


def comparison(monkeypatch, tmp_path, losses):
    """A comparison whose measurements are given, so that the order of the search is what is tested."""
    measured = []

    def measure(self, name, recipe):
        measured.append(name)
        return RecipeResult(name, 10 * (1 + losses.get(name, 0)), 0.0, 1.0, 100 + len(measured), 1.0)

    monkeypatch.setattr(qcompile.evaluation.compare.Comparison, "_measure", measure)
    windows = [torch.zeros(1, 4, dtype=torch.int64)]
    return (lambda: Comparison(torch.nn.Identity(), windows, list, tmp_path / "t.json", "l")), measured


def test_it_stops_at_the_first_that_is_good_enough(monkeypatch, tmp_path):
    make, measured = comparison(monkeypatch, tmp_path, {"w4a8": 0.5, "w4a16": 0.011, "w4a16-hqq": 0.01, "int8": 0.0})
    lines = []
    found = tune(make(), recipes=["w4a8", "w4a16", "w4a16-hqq", "int8"], tell=lines.append)
    assert found.chosen.recipe == "w4a16-hqq" and measured == ["float", "w4a8", "w4a16", "w4a16-hqq"]
    assert len(lines) == 4 and "goal 10.100" in lines[0]
    stricter = tune(make(), max_loss=0.001, recipes=["w4a8", "w4a16", "w4a16-hqq", "int8"])
    assert stricter.chosen.recipe == "int8" and measured[4:] == ["int8"], "the rest is remembered"
    plot_frontier(stricter.rows, 0.001, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_without_a_good_one_the_best_is_named(monkeypatch, tmp_path):
    make, _ = comparison(monkeypatch, tmp_path, {"w4a8": 0.5, "w4a16": 0.2, "int8": 0.3})
    found = tune(make(), recipes=["w4a8", "w4a16", "int8"])
    assert found.chosen is None and found.nearest.recipe == "w4a16"


@pytest.mark.parametrize("bad", [dict(max_loss=0.0), dict(max_loss=20.0), dict(recipes=[]), dict(recipes=["w5"])])
def test_nonsense_is_refused_before_work(monkeypatch, tmp_path, bad):
    make, measured = comparison(monkeypatch, tmp_path, {})
    with pytest.raises(ValueError):
        tune(make(), **bad)
    assert not measured


def test_the_ladder_goes_up():
    from qcompile.passes import Quantize
    from qcompile.pipeline.find_recipe import find_recipe

    bits = [next(c for c in find_recipe(n).passes if isinstance(c, Quantize)).weight.bits for n in LADDER]
    assert bits == sorted(bits)
