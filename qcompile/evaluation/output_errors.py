"""A plot of what quantizing did to the outputs of each site, as the passes that read inputs measured it."""

from __future__ import annotations

from pathlib import Path

from qcompile.evaluation.plots import plot_file
from qcompile.recipe.report import Report

CAPTION = "relative squared error of the output of each site over the calibration tokens, in the order of the graph"


def plot(report: Report, path: Path) -> None:
    """Draw the output errors of all sites that have one: rounded to nearest, and as the algorithm chose.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    measured = [site.output_error for site in report.sites if site.output_error is not None]
    with plot_file(path, (9, 4.5)) as axes:
        for label, values in zip(("rounded to nearest", report.recipe), zip(*measured, strict=True), strict=True):
            axes.plot([max(v, 1e-9) for v in values], marker=".", markersize=4, linewidth=0.8, label=label)
        axes.set(yscale="log", xlabel="site, in the order of the graph", ylabel="||(W - W^) x||^2 / ||W x||^2")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
