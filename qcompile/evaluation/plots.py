"""Plots in files: figures without a display and without global state of matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

NEEDS = "plots need: pip install 'torch-qcompile[plot]'"


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return util.find_spec("matplotlib") is not None


@contextmanager
def plot_file(path: Path, size: tuple[float, float] = (7, 4.5), *, columns: int = 1) -> Iterator[Any]:
    """A figure to draw on, written when the block ends.

    Args:
        path: the file; its suffix decides the format.
        size: width and height in inches.
        columns: axes side by side, with one y axis.

    Yields:
        The axes: one `matplotlib.axes.Axes`, or an array of them where `columns` > 1.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NEEDS) from error
    figure = Figure(figsize=size)
    axes = figure.subplots(1, columns, sharey=True)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def label_point(axes: Any, text: str, x: float, y: float) -> None:
    """Write a name beside a point."""
    axes.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=8)
