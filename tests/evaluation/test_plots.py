"""Plots: a file is written, and a missing package is said."""

from __future__ import annotations

import sys

import pytest

from qcompile.evaluation import plots
from qcompile.evaluation.plots import label_point, plot_file


@pytest.mark.parametrize("columns", [1, 2])
def test_a_file_of_the_size_is_written(columns, tmp_path):
    path = tmp_path / "a.png"
    with plot_file(path, (2, 1), columns=columns) as axes:
        first = axes if columns == 1 else axes[0]
        first.scatter([0, 1], [0, 1])
        label_point(first, "name", 0, 0)
        assert first.texts[0].get_text() == "name"
    data = path.read_bytes()
    assert data[1:4] == b"PNG" and [int.from_bytes(data[i : i + 4]) for i in (16, 20)] == [260, 130]


def test_nothing_is_written_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), plot_file(tmp_path / "a.png"):
        raise ZeroDivisionError
    assert not (tmp_path / "a.png").exists()


def test_without_matplotlib_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="torch-qcompile\\[plot\\]"), plot_file(tmp_path / "a.png"):
        pytest.fail("drawn")
    assert plots.is_available()
