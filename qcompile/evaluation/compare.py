"""Recipes side by side on one model and one text: quality, bytes, time and memory of each.

The row of a recipe is written to disk as soon as it is measured, so an interrupted comparison continues where it
stopped. The float model is run beside each candidate, and its logits are not kept: memory does not grow with the text.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from qcompile.api.quantize import quantize
from qcompile.evaluation.perplexity import agreement, perplexity
from qcompile.evaluation.plots import label_point, plot_file
from qcompile.memory.environment import versions
from qcompile.memory.process import measure_peak
from qcompile.passes import FoldNorm, Rotate, Untie
from qcompile.pipeline.presets import find_recipe
from qcompile.recipe.recipe import Recipe


@dataclass(frozen=True)
class RecipeResult:
    """One recipe on one model and text.

    Attributes:
        recipe: its name.
        perplexity: over the windows.
        kl: mean KL(float || quantized), nats per token.
        agreement: share of tokens whose most likely successor is the float model's.
        site_bytes: bytes of the weights of all sites, as they are stored.
        seconds: to quantize, calibration included.
        peak_bytes: peak memory of quantizing, above what the process used before; 0 if unknown.
    """

    recipe: str
    perplexity: float
    kl: float
    agreement: float
    site_bytes: int
    seconds: float
    peak_bytes: int = 0


@dataclass
class Comparison:
    """Rows of recipes on one model and text, measured once and kept in a file.

    Attributes:
        model: a float causal LM; not changed.
        token_windows: int64 [1, T] each.
        calibration: returns the batches for recipes that need data.
        out: a JSON file to write to and to continue from.
        label: what is measured (model, text); an `out` with another label is refused.
    """

    model: nn.Module
    token_windows: Sequence[Tensor]
    calibration: Callable[[], Sequence[Any]]
    out: Path | None = None
    label: str = ""

    def __post_init__(self) -> None:
        self.rows = self._read()

    def measure(self, name: str) -> RecipeResult:
        """The row of one recipe (a preset name or a JSON path), from the file or by quantizing a copy."""
        recipe = find_recipe(name)
        if recipe.name not in self.rows:
            self.rows[recipe.name] = self._measure(recipe.name, recipe)
            self._write()
        return self.rows[recipe.name]

    def _measure(self, name: str, recipe: Recipe) -> RecipeResult:
        if not recipe.passes:
            return RecipeResult(name, perplexity(self.model, self.token_windows, progress=False), 0.0, 1.0, 0, 0.0)
        batches = self.calibration() if recipe.needs else None
        start = time.perf_counter()
        with measure_peak() as peak:
            candidate = copy.deepcopy(self.model)
            report = quantize(candidate, recipe, batches, progress=False)
        seconds = time.perf_counter() - start
        found = agreement(candidate, self.model, self.token_windows)
        return RecipeResult(name, found.perplexity, found.kl, found.top1, report.bytes_after, seconds, peak.bytes)

    @property
    def _key(self) -> dict[str, Any]:
        first = self.token_windows[0]
        return {"label": self.label, "windows": len(self.token_windows), "length": int(first.shape[1])}

    def _read(self) -> dict[str, RecipeResult]:
        if self.out is None or not self.out.is_file():
            return {}
        data = json.loads(self.out.read_text())
        if data.get("of") != self._key:
            raise ValueError(
                f"{self.out} is of another comparison ({data.get('of')}). Fix: choose another file, or remove it"
            )
        return {row["recipe"]: RecipeResult(**row) for row in data["rows"]}

    def _write(self) -> None:
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        data = {"versions": versions(), "of": self._key, "rows": [asdict(r) for r in self.rows.values()]}
        work = self.out.with_suffix(".partial")
        work.write_text(json.dumps(data, indent=1) + "\n")
        work.replace(self.out)


def compare(comparison: Comparison, recipes: Sequence[str], *, progress: bool = True) -> list[RecipeResult]:
    """Measure the float model, then recipes (preset names or JSON paths).

    Raises:
        RecipeError: an unknown or impossible recipe, before any work.
    """
    names = ["float", *[r for r in recipes if r != "float"]]
    for name in names:
        find_recipe(name).check()
    return [comparison.measure(n) for n in track(names, "comparing", disable=not progress, transient=True)]


def table(rows: Sequence[RecipeResult]) -> Table:
    """One row per recipe."""
    found = Table("recipe", "perplexity", "KL to float", "same top-1", "weights MB", "quantize s", "peak MB")
    for r in rows:
        cost = (f"{r.site_bytes / 1e6:.0f}", f"{r.seconds:.1f}", f"{r.peak_bytes / 1e6:.0f}") if r.site_bytes else ()
        found.add_row(r.recipe, f"{r.perplexity:.2f}", f"{r.kl:.4f}", f"{r.agreement:.1%}", *cost)
    return found


def plot(rows: Sequence[RecipeResult], path: Path) -> None:
    """Draw perplexity against megabytes of quantized weights.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    with plot_file(path) as axes:
        for r in rows:
            if r.site_bytes:
                axes.scatter(r.site_bytes / 1e6, r.perplexity, s=40, color="C0")
                label_point(axes, r.recipe, r.site_bytes / 1e6, r.perplexity)
            else:
                axes.axhline(r.perplexity, color="0.5", linestyle="--", linewidth=1)
                axes.annotate("float", (1, r.perplexity), (-4, 3), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("quantized weights, MB (less is better)")
        axes.set_ylabel("perplexity (less is better)")
        axes.grid(alpha=0.3, which="both")
        axes.margins(x=0.15)


def rotated_copy(model: nn.Module) -> nn.Module:
    """A copy that computes the same function in randomly rotated bases.

    Weights that come from a quantized file lie on that file's grid, where rounding is nearly free; those of the copy
    do not, so it is what weight formats should be judged on.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        quantize(copied, Recipe("rotated copy", (Untie(), FoldNorm(), Rotate())), progress=False)
    return copied
