"""The plot of output errors: one line as rounded to nearest, one as chosen; sites without one are omitted."""

from __future__ import annotations

from contextlib import contextmanager
from xml.etree import ElementTree

import pytest

from qcompile.evaluation import output_errors
from qcompile.evaluation.plots import plot_file
from qcompile.recipe.report import Report, SiteReport


def test_both_lines_are_drawn_over_the_sites_that_were_measured(tmp_path, monkeypatch):
    sites = [SiteReport(f"{i}.weight", 8, 8, output_error=(0.1 * (i + 1), 0.01 * (i + 1))) for i in range(3)]
    report = Report("my-recipe", [sites[0], SiteReport("logits.weight", 8, 8), *sites[1:]])
    drawn = []

    @contextmanager
    def recorded(*args):
        with plot_file(*args) as axes:
            drawn.append(axes)
            yield axes

    monkeypatch.setattr(output_errors, "plot_file", recorded)
    output_errors.plot(report, tmp_path / "errors.svg")
    (axes,) = drawn
    nearest, chosen = axes.get_lines()
    assert list(nearest.get_ydata()) == pytest.approx([0.1, 0.2, 0.3]) and nearest.get_label() == "rounded to nearest"
    assert list(chosen.get_ydata()) == pytest.approx([0.01, 0.02, 0.03]) and chosen.get_label() == "my-recipe"
    assert axes.get_yscale() == "log" and ElementTree.parse(tmp_path / "errors.svg").getroot() is not None
