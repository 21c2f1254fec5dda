"""How fast sites train in fixed point beside float, at their sizes: which ones are slower, and what a report says.

On a CPU committed measurements decide (codegen/cpu/training_kernel_choice.py). On a GPU nothing was measured, so no
site counts as slower there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from qcompile.analysis.conv_sites import ConvSite, find_conv_sites
from qcompile.analysis.facts import Facts
from qcompile.codegen.cpu.training_kernel_choice import TrainingShape, choose_training_kernel
from qcompile.codegen.kernel_choice import KernelChoice
from qcompile.codegen.rows import rows_label, rows_of
from qcompile.ir.size_hint import hint
from qcompile.passes import FixedPoint
from qcompile.recipe.recipe import Recipe
from qcompile.recipe.report import Report


@dataclass(frozen=True)
class TrainingSpeed:
    """Of one site.

    Attributes:
        choice: its kernel, and float time / time in fixed point of its forward and backward pass.
        rows: for which it was judged.
        label: the same, as a report writes it.
    """

    choice: KernelChoice
    rows: int
    label: str

    def __str__(self) -> str:
        return f"{self.choice} at {self.label}"


def training_speeds(facts: Facts, recipe: Recipe, rows: int | None) -> dict[str, TrainingSpeed]:
    """Name of the weight -> speed of its site; of a weight with several products that with the most rows.

    Args:
        facts: of the program, as captured.
        recipe: to be applied; empty for one that trains nothing in fixed point.
        rows: M at which every linear is judged; None takes each one's M in the example, as convolutions always do.
    """
    if not any(isinstance(config, FixedPoint) for config in recipe.passes):
        return {}
    if any(weight.is_cuda for weight in facts.program.weights.values()):
        return {}
    found: dict[str, TrainingSpeed] = {}

    def judge(name: str, shape: TrainingShape, node: fx.Node, label: str) -> None:
        if name not in found or found[name].rows < shape.rows:
            found[name] = TrainingSpeed(choose_training_kernel(shape, node.meta["val"].dtype), shape.rows, label)

    for site in facts.sites:
        if site.kind == "linear":
            label = rows_label(site.input) if rows is None else f"rows {rows} (option)"
            judge(site.name, TrainingShape(rows or rows_of(site.input)[0], site.K, site.N), site.node, label)
    for convolution in find_conv_sites(facts.program):
        shape = _shape_of(convolution)
        judge(convolution.name, shape, convolution.node, f"{shape.rows} positions")
    return found


def _shape_of(site: ConvSite) -> TrainingShape:
    outputs, inputs, *kernel = (int(size) for size in site.weight.meta["val"].shape)
    batch, _, *sizes = (int(hint(size)) for size in site.node.meta["val"].shape)
    rows, taps = batch, 1
    for size in sizes:
        rows *= size
    for size in kernel:
        taps *= size
    return TrainingShape(max(rows, 1), inputs, outputs, taps, max(site.stride), len(kernel), site.groups)


def slower_sites(speeds: Mapping[str, TrainingSpeed], override: str) -> dict[str, str]:
    """Sites that train slower than float -> the reason, for the report; `override` is what trains them all the same."""
    return {
        name: f"{speed}: slower than float ({override} trains it)"
        for name, speed in speeds.items()
        if speed.choice.slower_than_float
    }


def report_speeds(report: Report, speeds: Mapping[str, TrainingSpeed]) -> list[str]:
    """Write the kernel of every site that trains into the report, and which are slower than float.

    Returns:
        These, as "name: kernel (0.5x float) at rows 8", slowest first.
    """
    passes = [entry for entry in report.passes if entry.name == "FixedPoint"]
    trained = {name for entry in passes for name in entry.done}
    for site in report.sites:
        if site.name in trained and site.name in speeds:
            site.kernel = {speeds[site.name].label: str(speeds[site.name].choice)}
    slow = [name for name in trained if name in speeds and speeds[name].choice.slower_than_float]
    slow.sort(key=lambda name: (speeds[name].choice.ratio or 0.0, name))
    told = [f"{name}: {speeds[name]}" for name in slow]
    if told:
        passes[0].notes.append(f"{len(told)} of {len(trained)} sites train slower than in float: {some(told)}")
    return told


def some(told: Sequence[str], most: int = 3) -> str:
    """The first of what `report_speeds` gives, and how many more there are."""
    more = f"; and {len(told) - most} more" if len(told) > most else ""
    return "; ".join(told[:most]) + more
